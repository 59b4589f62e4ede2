"""The few-shot baseline in a run's plan: tuned and evaluated beside the trials, and never one of them."""

from pathlib import Path
from typing import Any

import pytest

from retune.config import load_prompt, override
from retune.errors import ConfigError
from retune.records import Lineage
from retune.tasks.retrain import plan, select

ROOT = Path(__file__).parents[2]
BASELINE = {"name": "few-shot baseline", "overrides": {"tune.method": "few_shot", "tune.examples": 4}, "baseline": True}
SAME = {"tune.method": "few_shot"}


def run_of(family: str | None = "decoder", **overrides: Any) -> dict[str, Any]:
    """What the tasks before `plan` leave of a run."""
    prompt = override(load_prompt(ROOT / "prompts/ticket_priority.yaml"), {"evaluate.few_shot": 4} | overrides)
    earlier = {role: {"release": role, "outs": [{"path": "x", "md5": role}]} for role in ("champion", "baseline")}
    return {
        "prompt": prompt.model_dump(mode="json"),
        "family": family,
        "lineage": Lineage("", "", {}, "", False, "").to_json(),
        **earlier,
    }


def names(planned: list[dict[str, Any]]) -> list[str]:
    return [trial["name"] for trial in planned]


def test_the_baseline_follows_the_prompt_files_trials_and_a_forms() -> None:
    planned = plan(run_of())
    assert names(planned) == ["1: as in the prompt file", "2: learning_rate=0.01, seed=14", "few-shot baseline"]
    assert planned[-1] == BASELINE
    assert plan(run_of(), [{"tune.epochs": 1}]) == [{"name": "1: epochs=1", "overrides": {"tune.epochs": 1}}, BASELINE]
    assert plan(run_of(**{"evaluate.few_shot": 2}))[-1]["overrides"]["tune.examples"] == 2


def test_there_is_none_where_it_is_not_wanted_not_possible_or_a_trial_already() -> None:
    assert "few-shot baseline" not in names(plan(run_of(**{"evaluate.few_shot": 0})))
    assert "few-shot baseline" not in names(plan(run_of("encoder")))
    assert names(plan(run_of(), [{}, SAME])) == ["1: as in the prompt file", "2: method=few_shot"]
    assert names(plan(run_of(**SAME), [{}])) == ["1: as in the prompt file"]
    assert "few-shot baseline" in names(plan(run_of(), [SAME | {"tune.examples": 8}]))
    with pytest.raises(ConfigError, match="trials must name at least one"):
        plan(run_of(**{"trials": []}))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETUNE_STORE", "RETUNE_PROMPTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RETUNE_PROJECT", str(ROOT))
    monkeypatch.setenv("RETUNE_HOME", str(tmp_path))


def tuned(run: dict[str, Any], losses: list[float], **trials: Any) -> list[dict[str, Any]]:
    """What task `tune` returns for each trial."""
    return [
        {"trial": trial, "release": f"r{number}", "lineage": {}, "validation_loss": loss, "links": {}}
        for number, (trial, loss) in enumerate(zip(plan(run, **trials), losses, strict=True), 1)
    ]


def parts(chosen: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(contender["role"], contender["release"]) for contender in chosen]


@pytest.mark.usefixtures("environment")
def test_the_baseline_is_evaluated_and_no_candidate_however_good_it_is() -> None:
    run = run_of()
    chosen = select(run, tuned(run, [0.3, 0.2, 0.1]))
    assert parts(chosen) == [("candidate", "r2"), ("few_shot", "r3"), ("champion", "champion"), ("baseline", "baseline")]
    assert chosen[0]["few_shot"] == "r3"
    assert chosen[1]["trial"] == BASELINE
    none = run_of(**{"evaluate.few_shot": 0})
    assert select(none, tuned(none, [0.3, 0.2]))[0]["few_shot"] is None


@pytest.mark.usefixtures("environment")
def test_a_trial_that_is_few_shot_plays_the_part_and_may_win() -> None:
    run = run_of()
    lost = select(run, tuned(run, [0.1, 0.2], trials=[{}, SAME]))
    assert parts(lost)[:2] == [("candidate", "r1"), ("few_shot", "r2")]
    won = select(run, tuned(run, [0.3, 0.2], trials=[{}, SAME]))
    assert parts(won) == [("candidate", "r2"), ("champion", "champion"), ("baseline", "baseline")]
    assert won[0]["few_shot"] == "r2"


@pytest.mark.usefixtures("environment")
def test_no_release_is_evaluated_twice() -> None:
    run = run_of() | {"champion": {"release": "r3", "outs": []}}
    assert parts(select(run, tuned(run, [0.3, 0.2, 0.1]))) == [("candidate", "r2"), ("few_shot", "r3"), ("baseline", "baseline")]
