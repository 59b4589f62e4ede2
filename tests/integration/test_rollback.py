"""Rollback, bar, approval, and an alias moved by hand: real releases in a real registry. The tests run in order, on one ledger."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from loops import loop, trigger

from retune.audit import audit, blocks, title
from retune.config import load_prompt
from retune.document import markdown
from retune.errors import BadInputError, IntegrityError
from retune.ledger import Entry, Ledger, standing
from retune.registry import BARRED, PROJECTED, Registry
from retune.settings import Settings
from retune.store import open_store
from retune.tasks import retrain
from retune.tasks.ingest import ingest
from retune.tasks.resolve import resolve
from retune.tasks.rollback import choices, choices_markdown, chosen, rollback, unbar

pytestmark = pytest.mark.integration
NAME = "ticket_priority"
APPROVED = {"chosen": "Approve", "by": "anna", "at": "2026-01-01T00:00:00+00:00", "comment": "looks right"}


@pytest.fixture(scope="module")
def registry(project: Path) -> Registry:
    """A prompt with the template alone as version 1 and a tuned champion as version 2."""
    path = project / f"prompts/{NAME}.yaml"
    prompt = yaml.safe_load(path.read_text("utf-8"))
    short = {"trials": [{}], "evaluate": {"few_shot": 0, "probes": {"rows": 0}}}
    path.write_text(yaml.safe_dump({**prompt, **short}, sort_keys=False), "utf-8")
    landing = project / prompt["source"]["path"]
    shutil.copytree(project / f"examples/batches/{NAME}/1", landing)
    assert ingest(NAME, "ingest", "test") is not None
    promoted = loop(NAME, "first")
    assert promoted is not None
    assert (promoted["verdict"], promoted["version"]) == ("PROMOTE", "2")
    return Registry(Settings.load().tracking_uri, NAME)


def entries() -> list[Entry]:
    return Ledger(open_store(Settings.load().store), NAME).entries()


def aliases(registry: Registry) -> dict[str, str | None]:
    found = {name: registry.alias(name) for name in ("champion", "previous")}
    return {name: str(version.version) if version else None for name, version in found.items()}


def versions(registry: Registry) -> int:
    return len(registry.client.search_model_versions(f"name = '{NAME}'"))


def test_a_promoted_version_shows_its_metrics_lineage_and_card(registry: Registry) -> None:
    version = registry.client.get_model_version(NAME, "2")
    metrics = entries()[-1].body["candidate"]["metrics"]
    logged = registry.client.get_logged_model(version.source.removeprefix("models:/"))
    assert {m.key: m.value for m in logged.metrics if m.key in metrics} == pytest.approx(metrics)
    assert version.tags["retune.dataset_revision"] == "0"
    assert version.tags["retune.airflow_url"] == "http://airflow.test/runs/first"
    for part in ("macro_f1", "Dataset revision 0", "[DAG run first](http://airflow.test/runs/first)", version.tags["retune.release"]):
        assert part in version.description


def test_the_states_of_mlflow_runs_follow_the_tasks(registry: Registry) -> None:
    """A failed trial fails its run, a retry opens both again, and what a killed run leaves open the next one closes."""
    client = registry.client
    run: Any = resolve(NAME, trigger("too long"), {"tune.num_virtual_tokens": 1000})
    run = retrain.preprocess(run)
    parent = run["mlflow_run_id"]
    trial = retrain.plan(run)[0]
    with pytest.raises(BadInputError, match="prompt too long"):
        retrain.tune(run, trial)
    (child,) = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert [client.get_run(r).info.status for r in (parent, child.info.run_id)] == ["FAILED", "FAILED"]
    assert client.get_run(parent).info.run_name == "num_virtual_tokens=1000 · revision 0"
    retrain.tune(run, {**trial, "overrides": {"tune.num_virtual_tokens": 20}})
    assert [client.get_run(r).info.status for r in (parent, child.info.run_id)] == ["RUNNING", "FINISHED"]
    restored = client.get_run(child.info.run_id).data
    computed = entries()[-1].body["mlflow_run_id"]
    assert restored.tags["retune.restored"] == "true"
    assert client.get_run(restored.tags["retune.restored_from"]).data.tags["mlflow.parentRunId"] == computed
    assert restored.metrics.keys() >= {"best_validation_loss", "best_step", "validation_loss", "train_loss"}
    again: Any = resolve(NAME, trigger("after the kill"), force=True)
    assert [client.get_run(r).info.status for r in (parent, again["mlflow_run_id"])] == ["KILLED", "RUNNING"]


def test_a_rollback_makes_the_earlier_release_the_champion_and_bars_the_one_it_left(registry: Registry) -> None:
    left = entries()[-1].body["champion"]["release"]
    done = rollback(NAME, None, trigger("back", "answers got worse", by="oncall"))
    entry = entries()[-1]
    assert (entry.kind, entry.by, entry.reason) == ("rollback", "oncall", "answers got worse")
    assert (entry.body["from"], entry.body["to"]) == (left, done["to"])
    assert aliases(registry) == {"champion": "1", "previous": "2"}
    assert standing(entries()).barred == {left}
    assert registry.client.get_model_version(NAME, "2").tags[BARRED] == "rolled back by oncall: answers got worse"


def test_a_retried_rollback_rolls_back_once(registry: Registry) -> None:
    before = entries()
    rollback(NAME, None, trigger("back", "answers got worse", by="oncall"))
    assert entries() == before
    assert aliases(registry) == {"champion": "1", "previous": "2"}


def test_a_wrong_target_is_refused_with_the_right_ones(registry: Registry) -> None:
    barred = standing(entries()).barred
    for target, message in (
        ("7", "known: 2"),
        ("1", "is the champion of ticket_priority already"),
        ("2", "is barred"),
        (next(iter(barred))[:12], "retune unbar"),
        (None, "no earlier release"),
    ):
        with pytest.raises(BadInputError, match=message):
            rollback(NAME, target, trigger("wrong"))
    with pytest.raises(BadInputError, match="no earlier release"):
        choices(NAME)
    with pytest.raises(BadInputError, match=r"barred: 2 \("):
        unbar(NAME, "1", "tester", "why not")
    assert entries()[-1].kind == "rollback"


def test_a_scheduled_run_on_unchanged_data_does_not_bring_the_barred_release_back(registry: Registry) -> None:
    assert loop(NAME, "scheduled", run_type="scheduled") is None
    assert aliases(registry)["champion"] == "1"


def test_a_forced_run_restores_the_barred_release_and_holds(registry: Registry) -> None:
    before = versions(registry)
    held = loop(NAME, "forced", force=True)
    assert held is not None
    assert held["verdict"] == "HOLD"
    assert "rolled back" in entries()[-1].reason or "barred" in entries()[-1].reason
    assert versions(registry) == before
    assert aliases(registry)["champion"] == "1"


def test_unbarred_it_may_be_promoted_again_if_a_person_approves(registry: Registry) -> None:
    release = next(iter(standing(entries()).barred))
    assert unbar(NAME, release[:12], "tester", "it was the data")["version"] == "2"
    assert BARRED not in registry.client.get_model_version(NAME, "2").tags
    assert entries()[-1].kind == "unbar"
    refused = {**APPROVED, "chosen": "Reject", "comment": "not on a Friday"}
    for run_id, answer, reason in (
        ("unanswered", None, "Nobody approved the promotion within 24 h."),
        ("timed out", {**APPROVED, "chosen": "Reject", "by": None}, "Nobody approved the promotion within 24 h."),
        ("refused", refused, "anna did not approve the promotion: not on a Friday"),
    ):
        held = loop(NAME, run_id, answer, force=True, approval=True)
        assert held is not None
        assert (held["verdict"], held["reason"]) == ("HOLD", reason)
        assert entries()[-1].body["decision"]["gates"][-1]["name"] == "approval"
        assert aliases(registry)["champion"] == "1"
    promoted = loop(NAME, "approved", APPROVED, force=True, approval=True)
    assert promoted is not None
    assert (promoted["verdict"], promoted["version"]) == ("PROMOTE", "2")
    assert entries()[-1].body["decision"]["reasons"][-1] == "Approved by anna: looks right"
    assert versions(registry) == 2, "no new version"


def test_the_choices_of_the_form_are_the_ledgers(registry: Registry) -> None:
    (choice,) = choices(NAME)
    template = entries()[0].body["champion"]["release"]
    assert choice == f"version 1 · {template[:12]}"
    assert f"| {choice} | the template alone | " in choices_markdown(choices(NAME))
    assert chosen(NAME, choice) == template
    with pytest.raises(BadInputError, match="not a release that ticket_priority can go back to any more"):
        chosen(NAME, "version 9")


def test_an_alias_moved_by_hand_is_verified_and_entered(registry: Registry) -> None:
    registry.client.set_registered_model_alias(NAME, "champion", "1")
    run = resolve(NAME, trigger("after the move"), force=True)
    entry = entries()[-1]
    assert (entry.kind, entry.by) == ("move", "MLflow")
    assert entry.reason == "moved in MLflow from version 2 to 1"
    assert run is not None
    assert run["champion"]["version"] == "1"
    assert aliases(registry) == {"champion": "1", "previous": "2"}


def test_an_alias_moved_to_what_does_not_verify_stops_the_run(registry: Registry) -> None:
    before = entries()
    source = registry.client.get_model_version(NAME, "2").source
    foreign = registry.client.create_model_version(NAME, source).version
    registry.client.set_registered_model_alias(NAME, "champion", foreign)
    with pytest.raises(IntegrityError, match="Point the alias at version 1 again"):
        resolve(NAME, trigger("foreign"), force=True)
    assert entries() == before
    assert aliases(registry)["champion"] == str(foreign), "not reverted behind anybody's back"
    registry.client.set_registered_model_alias(NAME, "champion", "1")
    registry.client.delete_model_version(NAME, foreign)


def test_an_alias_that_a_killed_task_left_behind_follows_the_ledger(registry: Registry) -> None:
    """A promotion that was killed between the ledger and the alias is not taken for somebody's choice."""
    promoted = loop(NAME, "again", force=True)
    assert promoted is not None
    assert promoted["version"] == "2"
    registry.client.set_registered_model_alias(NAME, "champion", "1")  # as the killed task found it
    registry.client.set_registered_model_tag(NAME, PROJECTED, "1")
    before = entries()
    run: Any = resolve(NAME, trigger("after the killed promotion"), force=True)
    assert entries() == before
    assert run["champion"]["version"] == "2"
    assert aliases(registry)["champion"] == "2"


def test_the_audit_tells_all_of_it_with_the_evidence_of_real_runs(registry: Registry) -> None:
    settings = Settings.load()
    found = audit(open_store(settings), load_prompt(settings.prompts / f"{NAME}.yaml"))
    assert found.problems == []
    text = markdown(title(found.prompt), blocks(found))
    told = {number: part for part in text.split("\n### Entry ")[1:] for number in [int(part.split(":")[0])]}
    assert list(told) == [entry.n for entry in entries()]
    for entry in entries():
        assert entry.sha256 in told[entry.n]
        if "decision" in entry.body:
            lineage = entry.body["lineage"]
            evidence = (entry.body["candidate"]["release"], lineage["commit"], lineage["environment"], entry.body["mlflow_run_id"])
            assert [words for words in (*evidence, "of chance", "| gain | ", "Machine of ") if words not in told[entry.n]] == []
    assert "**Approval**: anna did not approve the promotion: not on a Friday" in text
    assert "### Revision 0" in text
