"""Prompt tests, times and cost from the prompt's files to the verdict: real stages, DVC, MLflow and store. The tests run in order."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from checkouts import run as run_module
from loops import loop

from retune.ledger import Entry, Ledger
from retune.settings import Settings
from retune.store import open_store
from retune.tasks.ingest import ingest

pytestmark = pytest.mark.integration
NAME = "ticket_priority"
OUTAGE = {"text": "I am furious! The whole office is down and nobody can work. This is an emergency, act immediately."}


def entries() -> list[Entry]:
    return Ledger(open_store(Settings.load().store), NAME).entries()


def gate(entry: Entry, name: str) -> dict[str, Any]:
    (found,) = [each for each in entry.body["decision"]["gates"] if each["name"] == name]
    return dict(found)


def write_checks(project: Path, *checks: dict[str, Any]) -> None:
    (project / f"prompts/{NAME}.checks.yaml").write_text(yaml.safe_dump({"checks": list(checks)}), "utf-8")


@pytest.fixture(scope="module")
def landed(project: Path) -> Path:
    path = project / f"prompts/{NAME}.yaml"
    prompt = yaml.safe_load(path.read_text("utf-8"))
    short = {"trials": [{}], "evaluate": {"few_shot": 0, "probes": {"rows": 0}}}
    path.write_text(yaml.safe_dump({**prompt, **short}, sort_keys=False), "utf-8")
    shutil.copytree(project / f"examples/batches/{NAME}/1", project / prompt["source"]["path"])
    assert ingest(NAME, "ingest", "test") is not None
    return project


def test_a_better_release_that_fails_a_required_check_is_rejected(landed: Path) -> None:
    wrong = {"name": "an outage is low", "input": OUTAGE, "equals": "low"}
    write_checks(landed, wrong, {"input": OUTAGE, "equals": "medium", "required": False})
    rejected = loop(NAME, "failing check")
    assert rejected is not None
    assert rejected["verdict"] == "REJECT"
    entry = entries()[-1]
    assert entry.reason.startswith("1 of 1 required checks failed. an outage is low: Expected 'low'; got '")
    assert [each["name"] for each in entry.body["decision"]["gates"] if not each["passed"]] == ["checks"], "and it is better"
    assert [check["passed"] for check in entry.body["checks"]] == [False, False]

    client, run_id = mlflow.MlflowClient(Settings.load().tracking_uri), entry.body["mlflow_run_id"]
    logged = client.get_run(run_id).data.metrics
    for role in ("candidate", "champion"):
        assert 0 < logged[f"{role}_latency_p50_ms"] <= logged[f"{role}_latency_p95_ms"]
    assert (logged["candidate_tuned_parameters"], logged["champion_tuned_parameters"]) == (20 * 128, 0)
    artifact = json.loads(Path(client.download_artifacts(run_id, "decision/checks.json")).read_text("utf-8"))
    assert artifact["checks"] == entry.body["checks"]
    report = Path(client.download_artifacts(run_id, "decision/decision.md")).read_text("utf-8")
    assert "| an outage is low | **failed** | yes | Expected 'low'; got " in report
    assert "| latency, 95th percentile | " in report


def test_a_mended_check_is_a_new_decision_on_the_same_data(landed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop(NAME, "unchanged", run_type="scheduled") is None
    executed = entries()[-1].body["measured"]["candidate"]["tune_seconds"]
    write_checks(landed, {"name": "an outage is high", "input": OUTAGE, "equals": "high"})
    monkeypatch.setenv("RETUNE_DEVICE_HOUR_PRICE", "3600")
    promoted = loop(NAME, "mended check")
    assert promoted is not None
    assert promoted["verdict"] == "PROMOTE"
    measured = entries()[-1].body["measured"]["candidate"]
    assert (measured["tune_seconds"], measured["cost"]) == (executed, pytest.approx(executed)), "restored, at what its execution took"
    checked = json.loads(run_module(landed, "retune.cli", "check", NAME, "--json").stdout)
    assert (checked["release"], checked["passed"]) == (entries()[-1].body["champion"]["release"], True)


def test_ceilings_refuse_what_is_slower_or_dearer(landed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETUNE_DEVICE_HOUR_PRICE", "3600")
    limits = {"tune.warmup_steps": 11, "promote.max_latency_ms": 0.001, "promote.max_latency_ratio": 1.1, "promote.max_cost": 0.5}
    rejected = loop(NAME, "ceilings", overrides=limits)
    assert rejected is not None
    assert rejected["verdict"] == "REJECT"
    entry = entries()[-1]
    assert (gate(entry, "latency")["passed"], gate(entry, "cost")["passed"]) == (False, False)
    monkeypatch.delenv("RETUNE_DEVICE_HOUR_PRICE")
    held = loop(NAME, "no price", overrides={"tune.warmup_steps": 11, "promote.max_cost": 0.5})
    assert held is not None
    assert held["verdict"] == "HOLD"
    assert "set RETUNE_DEVICE_HOUR_PRICE" in gate(entries()[-1], "cost")["reason"]


def test_the_champion_itself_is_held_without_being_measured(landed: Path) -> None:
    held = loop(NAME, "the champion again", force=True)
    assert held is not None
    assert held["verdict"] == "HOLD"
    body = entries()[-1].body
    assert body["measured"] == {}
    assert [each["name"] for each in body["decision"]["gates"] if not each["passed"]] == ["different_release", "gain"]


def test_a_wrong_file_of_checks_ends_the_run_at_its_first_task(landed: Path) -> None:
    from retune.errors import ConfigError

    write_checks(landed, {"name": "an outage", "input": OUTAGE, "equals": "urgent"})
    before = entries()
    with pytest.raises(ConfigError, match="an outage: equals: must be among the labels low, medium, high, got 'urgent'"):
        loop(NAME, "wrong file", force=True)
    assert entries() == before
