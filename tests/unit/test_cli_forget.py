"""The command `retune forget` with a real MLflow on SQLite: pages of runs, files of versions, questions and exit codes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from forgetting import HERS, World, kept, landed, release_id
from typer.testing import CliRunner

from retune.cli import app
from retune.ledger import Ledger
from retune.registry import RELEASE, Registry
from retune.settings import Settings
from retune.tasks.context import Context
from retune.tasks.forget import PAGES
from retune.tracking import Tracker

__all__ = ["kept", "landed"]

NAMED = ("--match", "customer=hers", "--reason", "request 17", "--by", "anna")


@pytest.fixture
def tracker(kept: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    """MLflow with a run on each revision, and one of another time, each with pages that hold a row of hers."""
    uri = Settings.load().tracking_uri
    # A registry looks a logged model up at the process's own address, which an earlier test may have set.
    mlflow.set_tracking_uri(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    tracker = Tracker(uri, "p")
    for revision in ("0", "1", "7"):
        run_id = tracker.open(f"run {revision}", f"on revision {revision}", {"retune.dataset_revision": revision})
        for page in ("dataset/report.json", "dataset/profile.html", *PAGES[1:]):
            tracker.text(run_id, HERS, page)
        tracker.text(run_id, "figures", "decision/decision.md")
        tracker.close(run_id)
    yield tracker
    mlflow.set_tracking_uri(None)


def retune(*arguments: str, answer: str | None = None) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["forget", "p", *arguments], input=answer)
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else done.output


def artifacts(tracker: Tracker, revision: str) -> list[str]:
    run = tracker.find(f"run {revision}")
    assert run is not None
    found = [item.path for item in tracker.client.list_artifacts(run.info.run_id)]
    return sorted([*found, *(item.path for item in tracker.client.list_artifacts(run.info.run_id, "decision"))])


def test_pages_of_the_runs_on_her_revisions_go_and_those_of_others_stay(kept: World, tracker: Tracker) -> None:
    code, said = retune(*NAMED, "--json", "--yes")
    assert code == 0, said
    assert said["rows"] == {"kept": 3, "quarantined": 1}
    assert said["deleted"]["objects"] > 5
    assert len(said["deleted"]["mlflow_runs"]) == 2
    for revision in ("0", "1"):
        assert artifacts(tracker, revision) == ["decision", "decision/decision.md"]
    assert "predictions.parquet" in artifacts(tracker, "7")
    assert Ledger(kept.store, "dataset").entries()[-1].by == "anna"
    assert retune(*NAMED, "--json", "--yes")[0] == 4, "nothing that is kept holds them any more"
    assert retune("--finish", "--reason", "request 17", "--json", "--yes")[0] == 0


def test_what_a_killed_call_left_in_mlflow_the_next_one_deletes(kept: World, tracker: Tracker) -> None:
    """The call died between ledger and MLflow."""
    kept.forget(match={"customer": "hers"})
    assert "predictions.parquet" in artifacts(tracker, "0")
    code, said = retune(*NAMED, "--json", "--yes")
    assert (code, said["revision"], len(said["deleted"]["mlflow_runs"])) == (0, None, 2)
    assert "predictions.parquet" not in artifacts(tracker, "0")


def test_a_version_whose_release_went_keeps_its_page_and_loses_its_files(kept: World, tracker: Tracker, tmp_path: Path) -> None:
    registry = Registry(Settings.load().tracking_uri, "p")
    run = tracker.find("run 0")
    assert run is not None
    model = registry.client.create_logged_model(run.info.experiment_id, source_run_id=run.info.run_id)
    (tmp_path / "rows.jsonl").write_text(HERS, "utf-8")
    registry.client.log_model_artifact(model.model_id, str(tmp_path / "rows.jsonl"))
    registry.client.create_registered_model("p")
    registry.client.create_model_version("p", f"models:/{model.model_id}", model_id=model.model_id, tags={RELEASE: release_id(b"few")})
    code, said = retune(*NAMED, "--json", "--yes")
    assert (code, said["deleted"]["mlflow_versions"]) == (0, ["1"]), said
    assert "deleted by retune forget at dataset revision 2" in registry.client.get_model_version("p", "1").description
    assert not list(Path(model.artifact_location.removeprefix("file://")).rglob("rows.jsonl"))
    assert retune(*NAMED, "--json", "--yes")[0] == 4


def test_an_active_run_is_not_overtaken(kept: World, tracker: Tracker) -> None:
    tracker.open("now", "new data · revision 1", {})
    code, said = retune(*NAMED, "--yes")
    assert code == 1
    assert "a run of p is active in MLflow" in said
    assert "--force" in said
    assert retune(*NAMED, "--dry-run")[0] == 1
    assert retune(*NAMED, "--yes", "--force")[0] == 0


def test_a_run_that_begins_while_somebody_is_asked_is_not_overtaken(kept: World, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> bool:
        tracker.open("now", "new data · revision 1", {})
        return True

    monkeypatch.setattr("typer.confirm", answer)
    before = kept.store.list()
    code, said = retune(*NAMED)
    assert code == 1
    assert "a run of p is active in MLflow" in said
    assert kept.store.list() == before


def test_a_run_whose_failed_task_is_tried_again_is_active(kept: World, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failed try has marked it FAILED; the tasks that log nothing mark it RUNNING no less than the others do."""
    context = Context.load(kept.prompt)
    run_id = tracker.open("now", "new data · revision 1", {})
    with pytest.raises(OSError), context.failing(run_id):
        raise OSError
    assert tracker.active() == []
    monkeypatch.setenv("AIRFLOW_CTX_TRY_NUMBER", "2")
    with context.failing(run_id):
        assert [run for run, _ in tracker.active()] == [run_id]
    assert [run for run, _ in tracker.active()] == [run_id]


def test_pages_of_a_run_that_was_active_meanwhile_go_with_finish(kept: World, tracker: Tracker) -> None:
    """It uploaded them after the first call had cleared the run."""
    assert retune(*NAMED, "--yes", "--force")[0] == 0
    run = tracker.find("run 1")
    assert run is not None
    tracker.text(run.info.run_id, HERS, "predictions.json")
    code, said = retune("--finish", "--reason", "request 17", "--json", "--yes")
    assert (code, said["deleted"]["mlflow_runs"]) == (0, [run.info.run_id])
    assert artifacts(tracker, "1") == ["decision", "decision/decision.md"]


def test_a_person_is_shown_what_goes_and_asked(kept: World, tracker: Tracker) -> None:
    before = kept.store.list()
    code, said = retune(*NAMED, answer="n\n")
    assert code == 1
    assert "nothing was forgotten" in said
    assert kept.store.list() == before
    code, said = retune(*NAMED, "--dry-run")
    assert code == 0
    assert "a dry run" in said
    assert kept.store.list() == before
    code, said = retune(*NAMED, answer="y\n")
    assert code == 0, said
    for part in ("dataset revision", "3 row(s)", "still the champion", "forgotten: 3 row(s) and 1 quarantined, at dataset revision 2"):
        assert part in said


def test_rows_from_a_file_need_the_texts_alone(kept: World, tracker: Tracker, tmp_path: Path) -> None:
    file = tmp_path / "hers.csv"
    file.write_text(f'text\n"{HERS}"\n', "utf-8")
    code, said = retune("--rows-file", str(file), "--reason", "r", "--json", "--dry-run")
    assert code == 0, said
    assert said["ids"] == ["1:31", "2:21"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name rows by"),
        (["--match", "customer=hers", "--finish"], "name rows by"),
        (["--match", "customer"], "COLUMN=VALUE"),
        (["--match", "age=7", "--yes"], "text, label, customer"),
        (["--id", "7", "--yes"], "OBJECT:ROW"),
        (["--match", "customer=hers", "--json"], "--yes"),
        (["--match", "text=jane@x.org", "--yes"], "--rows-file"),
    ],
)
def test_a_wrong_call_is_told_what_is_right(kept: World, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", Settings.load().tracking_uri)
    code, said = retune(*arguments, "--reason", "r")
    assert code == 2
    assert message in said
