"""`retune forget` on what real stages, DVC and MLflow left: nothing of the rows stays, and everything else goes on. Tests run in order."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from checkouts import environment_of, run
from loops import loop
from small import HERS, NAME, QUARANTINED, ROWS, TESTED, landed
from typer.testing import CliRunner

from retune.cli import app
from retune.ledger import Entry, Ledger, standing
from retune.settings import Settings
from retune.store import open_store
from retune.tasks.ingest import ingest
from retune.tracking import Tracker

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def kept(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project, moved by this module alone."""
    with environment_of(small), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", Settings.load().tracking_uri)
        yield small


def entries(name: str) -> list[Entry]:
    return Ledger(open_store(Settings.load()), name).entries()


def retune(*arguments: str) -> Any:
    """Exit code and JSON of a command."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else done.output


def holding(project: Path, text: str) -> list[str]:
    """Files under .retune, the landing zone apart, that hold a text: store, caches, MLflow's artifacts."""
    files = [path for path in sorted((project / ".retune").rglob("*")) if path.is_file() and "landing" not in path.parts]
    return [str(path.relative_to(project)) for path in files if text in shown(path.read_bytes())]


def shown(content: bytes) -> str:
    if not content.startswith(b"PAR1"):
        return content.decode(errors="replace")
    return "\n".join(str(value) for column in pq.read_table(io.BytesIO(content)).to_pydict().values() for value in column)


def test_a_dry_run_says_what_would_go_and_writes_nothing(kept: Path) -> None:
    before = sorted(open_store(Settings.load()).list())
    code, said = retune("forget", NAME, "--reason", "request 17", "--match", f"text={HERS}", "--dry-run")
    assert code == 0, said
    assert said["rows"] == {"kept": 1, "quarantined": 0}
    assert said["revisions"] == {"0": {"kept": 1, "quarantined": 0}}
    assert said["revision"] is None
    assert sorted(open_store(Settings.load()).list()) == before


def test_what_nobody_wrote_is_told_by_the_exit_code(kept: Path) -> None:
    code, said = retune("forget", NAME, "--reason", "request 16", "--match", "text=nobody wrote this", "--yes")
    assert (code, said["rows"]) == (4, {"kept": 0, "quarantined": 0})
    assert retune("forget", NAME, "--reason", "r", "--match", "customer=7", "--yes")[0] == 2, "no such column"
    assert retune("forget", NAME, "--reason", "r", "--yes")[0] == 2, "no rows named"


def test_an_active_run_is_not_overtaken(kept: Path) -> None:
    tracker = Tracker(Settings.load().tracking_uri, NAME)
    opened = tracker.open("another run", "another run", {})
    code, said = retune("forget", NAME, "--reason", "request 17", "--match", f"text={HERS}", "--yes")
    tracker.close(opened, "KILLED")
    assert code == 1
    assert "active in MLflow" in said
    assert [entry.kind for entry in entries("dataset")] == ["revision"]


def test_her_rows_leave_store_caches_and_mlflow(kept: Path, tmp_path: Path) -> None:
    assert any("mlartifacts" in name for name in holding(kept, "Rose Lane")), "the test must look where they are"
    assert any("store/dvc" in name for name in holding(kept, "Rose Lane"))
    assert any("cache" in name for name in holding(kept, "Rose Lane"))
    file = tmp_path / "hers.csv"
    file.write_text(f'text\n"{HERS}"\n"{TESTED}"\n"{QUARANTINED}"\n', "utf-8")
    code, said = retune("forget", NAME, "--reason", "request 17", "--rows-file", str(file), "--yes")
    assert code == 0, said
    assert said["rows"] == {"kept": 2, "quarantined": 1}
    assert said["revision"] == 1
    assert said["tables"].keys() >= {"dataset/train.parquet", "dataset/test.parquet", "predictions.parquet"}
    assert list(said["releases_holding"].values()) == ["deleted"], "the few-shot baseline's"
    assert len(said["deleted"]["mlflow_runs"]) == 1
    assert holding(kept, "Rose Lane") == []
    assert set(said["releases_tuned"]) == {entries(NAME)[-1].body["candidate"]["release"]}
    assert [entry.kind for entry in entries("dataset")] == ["revision", "forget"]


def test_a_second_call_finds_nothing_left(kept: Path) -> None:
    assert retune("forget", NAME, "--reason", "request 17", "--match", f"text={HERS}", "--yes")[0] == 4
    assert retune("forget", NAME, "--reason", "request 17", "--finish", "--yes")[0] == 0
    assert len(entries("dataset")) == 2


def test_an_earlier_revision_is_laid_without_them_and_says_so(kept: Path) -> None:
    sentence = "dataset revision 0 was rewritten by forget at revision 1: 2 rows and 1 quarantined of ticket_priority less"
    code, said = retune("checkout", "--data", "0", "--force")
    assert code == 0, said
    assert said["rewritten"] == [sentence]
    run(kept, "dvc", "pull", "-q", "data.dvc")
    texts = [shown(path.read_bytes()) for path in (kept / "data").rglob("*.parquet")]
    assert sum(text.count("Regards") for text in texts) > 10
    assert not any("Rose Lane" in text for text in texts)
    release = entries(NAME)[-1].body["candidate"]["release"]
    code, said = retune("checkout", release[:12], "--force")
    assert (code, said["rewritten"]) == (0, [sentence]), said
    run(kept, "dvc", "pull", "-q", "-d", f"evaluate@{NAME}")
    code, said = retune("reproduce", NAME, "--release", release[:12])
    assert code == 1
    assert sentence in said


def test_the_next_run_goes_through_on_what_is_left(kept: Path) -> None:
    done = loop(NAME, "after")
    assert done is not None
    last = entries(NAME)[-1]
    assert (last.body["dag_run_id"], last.body["dataset_revision"]) == ("after", 1)
    assert holding(kept, "Rose Lane") == []


def test_a_release_judged_before_is_still_loaded_and_tried(kept: Path) -> None:
    """A rollback's smoke test reads the test split and predictions of then, which are those of now without the rows."""
    from retune.config import load_prompt
    from retune.tasks.context import Context
    from retune.tasks.release import smoke_test

    context = Context.load(load_prompt(Settings.load().prompts / f"{NAME}.yaml"))
    now = standing(entries(NAME)).champion
    assert now is not None
    smoke_test(context, entries(NAME), now["release"], f"/{now['version']}")


def test_an_object_that_changes_does_not_bring_them_back(kept: Path) -> None:
    place = kept / ".retune/landing" / NAME / "a.csv"
    place.write_text(landed(ROWS + 2, (HERS, "low"), (TESTED, "low"), (QUARANTINED, "P1")), "utf-8")
    assert ingest(NAME, "again", "test") is not None
    record = entries("dataset")[-1].body["objects"][NAME]["a.csv"]
    assert record["forgotten"] == 3
    assert record["rows"] == ROWS + 5
    assert holding(kept, "Rose Lane") == []
