"""Task `measure` on recorded releases of a tiny model: a folder store and the task's own process, no stack."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import tiny
import yaml

from retune.config import load_prompt, override
from retune.errors import IntegrityError
from retune.inference.predictor import Predictor
from retune.inference.release import write_release
from retune.ledger import Ledger
from retune.settings import Settings
from retune.stages.measure import WARM_UP, take_turns
from retune.store import open_store
from retune.tasks.measure import check_results, measure, measured_of
from retune.tracking import Tracker

TEST = pd.DataFrame(tiny.make_rows(40, seed=5))
CHECKS = {
    "checks": [
        {"name": "a label", "input": {"text": "router"}, "one_of": ["low", "medium", "high"]},
        {"name": "no such answer", "input": {"text": "router"}, "contains": "never", "required": False},
    ]
}


class Noting(Predictor):
    """Notes who answered what."""

    def answer(self, row: Any) -> str:
        said = super().answer(row)
        self.told.append((self.role, row["text"], said))
        return said


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of prompt p, with the candidate and the champion, whose tuning took 90 s, under `evaluated`."""
    for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_PROMPTS", "RETUNE_BASE_MODELS", "RETUNE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RETUNE_PROJECT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("RETUNE_DEVICE_HOUR_PRICE", "4")
    monkeypatch.setenv("RETUNE_THREADS", "1")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "prompts").mkdir()
    base = tiny.save_base(tmp_path / "models/tiny")
    raw = tiny.make_prompt(name="p", base_model=tiny.reference(base)).model_dump(mode="json")
    (tmp_path / "prompts/p.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    prompt = load_prompt(tmp_path / "prompts/p.yaml")
    store = open_store(Settings.load())
    evaluated = []
    for role, seconds in (("candidate", 1800), ("champion", 90)):
        folder = tmp_path / f"releases/{role}"
        made = prompt if role == "candidate" else override(prompt, {"tune.method": "none"})
        tensors = tiny.tuned(tiny.make_soft_prompt(base)) if role == "candidate" else {}
        release = write_release(folder, made.released(), tensors, base, {})
        lineage = replace(tiny.lineage(store, folder, test=TEST), machines={"tune": {"seconds": seconds}})
        evaluated.append({"role": role, "release": release, "lineage": lineage.to_json()})
    champion = {"release": evaluated[1]["release"], "version": "1", "metrics": {}}
    Ledger(store, "p").append("found", "t", "alone", {"champion": champion, "lineage": evaluated[1]["lineage"]}, None)
    evaluated[1]["lineage"] = replace(lineage, machines={}).to_json()  # as it is laid beside the run's data and code
    return {"prompt": prompt.model_dump(mode="json"), "checks": CHECKS, "champion": champion, "mlflow_run_id": "-", "evaluated": evaluated}


def test_candidate_and_champion_are_timed_priced_and_checked(run: dict[str, Any]) -> None:
    found = measure(run, run["evaluated"])
    assert set(found["measured"]) == {"candidate", "champion"}
    measured = measured_of(found)
    assert found["champion"] == run["champion"]["release"]
    for figures in measured.values():
        assert 0 < figures.latency_p50_ms <= figures.latency_p95_ms
        assert figures.tokens_per_second > 0
    assert (measured["candidate"].tuned_parameters, measured["champion"].tuned_parameters) == (4 * 32, 0)
    assert (measured["candidate"].tune_seconds, measured["candidate"].cost) == (1800, 2.0)
    assert (measured["champion"].tune_seconds, measured["champion"].cost) == (90, pytest.approx(0.1))
    results = check_results(run, found)
    assert results is not None
    assert [(result.name, result.required, result.passed) for result in results] == [
        ("a label", True, True),
        ("no such answer", False, False),
    ]


def test_without_a_price_or_a_record_of_the_tuning_the_cost_is_not_known(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETUNE_DEVICE_HOUR_PRICE")
    run["evaluated"][0]["lineage"]["machines"] = {}
    same = {**run, "checks": None}
    found = measure(same, run["evaluated"])
    assert (found["measured"]["candidate"]["tune_seconds"], found["measured"]["candidate"]["cost"]) == (None, None)
    known = measured_of(found)["candidate"]
    assert known.tune_seconds != known.tune_seconds, "not known is NaN"
    assert known.cost is None
    assert check_results(same, found) is None
    assert check_results(run, found) == [], "the run has checks, and none was run"
    one = {"name": "a label", "required": True, "passed": True, "reason": ""}
    assert check_results(run, {**found, "checks": [one]}) == [], "one of two"


def test_a_release_that_is_not_the_recorded_one_is_not_measured(run: dict[str, Any]) -> None:
    tracker = Tracker(Settings.load().tracking_uri, "p")
    mlflow_run = tracker.open("run", "run", {})
    run["evaluated"][0]["release"] = "0" * 64
    with pytest.raises(IntegrityError, match="0000000000"):
        measure({**run, "mlflow_run_id": mlflow_run}, run["evaluated"])
    assert tracker.client.get_run(mlflow_run).info.status == "FAILED"


def test_the_tasks_own_process_has_no_need_of_torch() -> None:
    code = "import sys, retune.tasks.measure\nprint([m for m in ('torch', 'transformers', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_releases_take_turns_on_the_same_rows_and_the_first_answers_do_not_count(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 0.01)  # each prediction takes 10 ms
    monkeypatch.setattr("retune.stages.measure.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    prompt, told, predictors = tiny.make_prompt(), [], {}
    for role, tensors in (("candidate", tiny.tuned(tiny.make_soft_prompt(llama))), ("champion", {})):
        made = prompt if tensors else override(prompt, {"tune.method": "none"})
        predictors[role] = Noting(llama, made, tensors)
        predictors[role].told, predictors[role].role = told, role
    rows = TEST.head(5)
    found = take_turns(predictors, rows)
    assert set(found) == {"candidate", "champion"}
    texts = [*rows["text"].head(WARM_UP), *rows["text"]]
    assert [text for _, text, _ in told] == [text for text in texts for _ in range(2)]
    assert [role for role, _, _ in told] == ["candidate", "champion", "champion", "candidate"] * 4
    for role, figures in found.items():
        said = {text: answer for by, text, answer in told if by == role}
        tokens = sum(
            len(llama.tokenizer.encode(f"Ticket: {text}\nPriority:", add_special_tokens=False))
            + len(llama.tokenizer.encode(f" {answer}", add_special_tokens=False))
            for text, answer in said.items()
        )
        assert (figures["latency_p50_ms"], figures["latency_p95_ms"]) == (pytest.approx(10), pytest.approx(10))
        assert figures["tokens_per_second"] == pytest.approx(tokens / 0.05)


def test_a_candidate_that_is_the_champion_is_not_measured(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    candidate = run["evaluated"][0]
    found = measure({**run, "champion": {**run["champion"], "release": candidate["release"]}}, [candidate])
    assert found == {"measured": {}, "checks": None, "champion": candidate["release"]}
    assert capsys.readouterr().out == "the candidate is the champion itself: nothing is measured\n"
