"""Every verdict with its reason, through the DAGs on the embedded stack: real releases of an example prompt. The tests run in order."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from checkouts import run

from retune.ledger import Entry, Ledger
from retune.store import open_store

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
NAME = "ticket_priority"
QUICK = {"tune.epochs": 1}
"""For releases whose verdict does not rest on how good they are."""
GUARDED = {"promote.max_slice_gap": 0.1, "promote.max_negative_flips": 0.2}


@pytest.fixture(scope="module", autouse=True)
def champion(project: Path) -> Iterator[Entry]:
    """The first promotion: one that is better than the template alone and breaks nothing."""
    path = project / f"prompts/{NAME}.yaml"
    prompt = yaml.safe_load(path.read_text("utf-8"))
    short = {
        "trials": [{}],
        "schedule": {"on_new_data": False},
        "evaluate": {"few_shot": 0, "probes": {"rows": 40, "perturbations": ["typos", "case"]}},
    }
    path.write_text(yaml.safe_dump({**prompt, **short}, sort_keys=False), "utf-8")
    run(project, "retune.cli", "up")
    try:
        land(project, *(ROOT / f"examples/batches/{NAME}/1").iterdir())
        assert judged(project, "better", **GUARDED)[0] == "PROMOTE"
        yield last(project)
    finally:
        run(project, "retune.cli", "down")


def land(project: Path, *files: Path) -> None:
    run(project, "retune.cli", "land", NAME, *map(str, files))
    run(project, "retune.cli", "run", "ingest")


def last(project: Path) -> Entry:
    return Ledger(open_store(str(project / ".retune/store")), NAME).entries()[-1]


def judged(project: Path, reason: str, **overrides: Any) -> tuple[str, dict[str, dict[str, Any]]]:
    """Verdict of a DAG run and its gates by name, as the ledger has them; what the command prints and MLflow say the same."""
    settings = [word for name, value in overrides.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    told = json.loads(run(project, "retune.cli", "run", NAME, "--force", "--json", "--reason", reason, *settings).stdout)
    entry = last(project)
    decision = entry.body["decision"]
    assert (entry.body["dag_run_id"], entry.body["triggered"]["reason"]) == (told["dag_run_id"], reason)
    assert (told["state"], told["verdict"], told["reasons"]) == ("success", decision["verdict"], decision["reasons"])
    assert (entry.kind, entry.reason) == (decision["verdict"].lower(), decision["reasons"][0])
    stack = json.loads((project / ".retune/stack.json").read_text("utf-8"))
    client = mlflow.MlflowClient(stack["mlflow_url"])
    found = client.get_run(entry.body["mlflow_run_id"])
    assert (found.data.tags["retune.verdict"], found.info.status) == (decision["verdict"], "FINISHED")
    page = Path(client.download_artifacts(found.info.run_id, "decision/report.html")).read_text("utf-8")
    assert f"{NAME}: {decision['verdict']}" in page
    print(reason, entry.reason)
    return decision["verdict"], {gate["name"]: gate for gate in decision["gates"]}


@contextmanager
def bug(project: Path, line: str) -> Iterator[None]:
    """A line more in stage evaluate, after the predictions are made."""
    path = project / "src/retune/stages/evaluate.py"
    before = path.read_text("utf-8")
    place = "    predictions = answers(test)\n"
    assert place in before
    path.write_text(before.replace(place, f"{place}    {line}\n"), "utf-8")
    try:
        yield
    finally:
        path.write_text(before, "utf-8")


def failed(gates: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, gate in gates.items() if not gate["passed"]]


def test_probes_of_both_releases_are_measured_and_kept(champion: Entry) -> None:
    evaluated = champion.body["candidate"]["metrics"]
    assert {"calibration_error", "macro_precision", "weighted_recall"} <= set(evaluated)
    gates = {gate["name"]: gate for gate in champion.body["decision"]["gates"]}
    assert "guarded slices and sets" in gates["slices"]["reason"]
    assert gates["negative_flips"]["threshold"] == 0.2


def test_one_that_is_equal_is_held(project: Path) -> None:
    verdict, gates = judged(project, "equal", **{"tune.warmup_steps": 11})
    assert verdict == "HOLD"
    assert failed(gates) == ["gain"]
    assert "cannot be told from the champion's" in gates["gain"]["reason"]


def test_one_that_is_worse_is_rejected(project: Path) -> None:
    verdict, gates = judged(project, "worse", **{"tune.method": "none"})
    assert verdict == "REJECT"
    assert "macro_f1 is measurably worse" in gates["gain"]["reason"]


def test_one_whose_figures_are_no_numbers_is_rejected(project: Path) -> None:
    with bug(project, 'predictions.loc[predictions.index[: int(release.prompt.tune.warmup_steps == 12)], "p_low"] = float("nan")'):
        verdict, gates = judged(project, "nan", **QUICK, **{"tune.warmup_steps": 12})
    assert verdict == "REJECT"
    assert "log_loss is nan" in gates["complete"]["reason"]


def test_one_that_was_evaluated_on_other_rows_is_held(project: Path) -> None:
    with bug(project, "predictions = predictions.iloc[int(release.prompt.tune.warmup_steps == 13) :]"):
        verdict, gates = judged(project, "other rows", **QUICK, **{"tune.warmup_steps": 13})
    assert verdict == "HOLD"
    assert "172 and 173 rows" in gates["same_test_rows"]["reason"]
    assert "gain" in failed(gates), "nothing is compared across other rows"


def test_one_whose_required_check_fails_is_rejected(project: Path) -> None:
    path = project / f"prompts/{NAME}.checks.yaml"
    before = path.read_text("utf-8")
    outage = {"text": "I am furious! The whole office is down and nobody can work. This is an emergency, act immediately."}
    path.write_text(yaml.safe_dump({"checks": [{"name": "never", "input": outage, "equals": "low"}]}), "utf-8")
    try:
        verdict, gates = judged(project, "check", **QUICK, **{"tune.warmup_steps": 14})
    finally:
        path.write_text(before, "utf-8")
    assert verdict == "REJECT"
    assert gates["checks"]["reason"].startswith("1 of 1 required checks failed. never: Expected 'low'; got '")


def test_one_that_is_better_and_breaks_a_slice_is_rejected(project: Path) -> None:
    """The rule changes everywhere but on the phone, and the template does not show the channel: what is learnt for all is wrong there."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import ticket_priority as example
        from landing import Dirt, Landing, separated, write_batches
        from tickets import PRODUCTS, Mix
    finally:
        sys.path.remove(str(ROOT / "examples"))
    outages = Mix((6, 3, 2), (6, 3, 1), (2, 3, 5), (5, 1.5, 3.5), PRODUCTS, 0.2)
    shared = {"write": separated(",", "utf-8"), "mix": outages, "regions": (5, 3, 2), "start": datetime(2026, 3, 2, 8), "dirt": Dirt()}
    write_batches(
        NAME,
        [
            Landing("new.csv", clean=1000, answers=example.HIGHEST_OF_THREE, channels={"email": 5, "web": 3}, **shared),
            Landing("phone.csv", clean=150, answers=example.HIGHER_OF_TWO, channels={"phone": 1}, **shared),
        ],
        project / "later",
    )
    land(project, project / "later/new.csv", project / "later/phone.csv")
    # How far the phone falls depends on the last bits of the tuning: 0.07 and more were seen.
    verdict, gates = judged(project, "breaks the phone", **{**GUARDED, "promote.max_slice_gap": 0.04, "promote.looks_per_test_split": 2})
    assert gates["gain"]["passed"], gates["gain"]["reason"]
    assert verdict == "REJECT"
    assert "channel=phone" in gates["slices"]["reason"]
    assert gates["slices"]["value"] > 0.04
