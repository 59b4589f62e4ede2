"""Symptoms of docs/troubleshooting.md provoked for real on the embedded store, and the ways out that the page names. In order."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkouts import ROOT
from checkouts import run as run_module
from loops import trigger
from mlflow.exceptions import MlflowException

from retune.child import run_child
from retune.dvc_files import REMOTE, object_name
from retune.errors import IntegrityError, StageError
from retune.ledger import Ledger
from retune.records import Lineage
from retune.registry import CHAMPION, Registry
from retune.settings import Settings
from retune.store import open_store
from retune.tasks import retrain
from retune.tasks.context import Context
from retune.tasks.ingest import ingest
from retune.tasks.resolve import resolve

pytestmark = pytest.mark.integration
NAME = "ticket_priority"
GUIDE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")


def quoted(beginning: str) -> str:
    """The message of the page that begins so, as a regular expression: what the page says is what must come."""
    (found,) = [message for message in re.findall(r"^- `([^`]+)`", GUIDE, re.MULTILINE) if message.startswith(beginning)]
    return ".*".join(map(re.escape, found.split("…")))


@contextmanager
def away(place: Path) -> Iterator[None]:
    """The file or folder is not there, until it is put back as from a backup."""
    backup = place.with_name(f"{place.name}.backup")
    place.rename(backup)
    yield
    if place.is_dir():
        shutil.rmtree(place)
    backup.rename(place)


@dataclass(frozen=True)
class Landed:
    project: Path
    run: dict[str, Any]
    """What task `preprocess` of the prompt's first run handed on."""

    @property
    def store(self) -> Path:
        return self.project / ".retune/store"

    def resolve(self, run_id: str) -> dict[str, Any]:
        run = resolve(NAME, trigger(run_id), force=True)
        assert run is not None
        return run

    @property
    def lineage(self) -> Lineage:
        return Lineage.from_json(self.run["lineage"])

    def place(self, path: str) -> Path:
        """The object in the store that holds a tracked file of the run's lineage."""
        (md5,) = Context.of(self.run).workspaces.files(self.lineage, path).values()
        return self.store / REMOTE / object_name(md5)


@pytest.fixture(scope="module")
def landed(project: Path) -> Landed:
    shutil.copytree(ROOT / f"examples/batches/{NAME}/1", project / f".retune/landing/{NAME}")
    assert ingest(NAME, "ingest", "test") is not None
    run = resolve(NAME, trigger("first"))
    assert run is not None
    return Landed(project, retrain.preprocess(run))


def test_a_killed_stage_says_that_it_was_memory(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=quoted("It was killed")) as error:
        run_child("dvc", ["bash", "-c", "kill -9 $$"], tmp_path, {}, print)
    assert "exit code 137" in str(error.value)


def test_a_lost_asset_event_loses_no_data(landed: Landed) -> None:
    """Files that were ingested while nobody heard of it are in the next run, whatever starts it."""
    shutil.copytree(ROOT / f"examples/batches/{NAME}/2", landed.project / f".retune/landing/{NAME}/2")
    told = ingest(NAME, "unheard", "test")
    assert told is not None
    assert landed.resolve("by hand")["rows"] == told["rows"] > landed.run["rows"]


def test_a_run_that_was_killed_is_closed_by_the_next(landed: Landed, capsys: pytest.CaptureFixture[str]) -> None:
    landed.resolve("killed before its end")
    landed.resolve("the next")
    assert re.search(quoted("MLflow run"), capsys.readouterr().out)


def test_an_object_that_is_gone_is_made_again(landed: Landed, capsys: pytest.CaptureFixture[str]) -> None:
    place = landed.place(f"artifacts/{NAME}/dataset/train.parquet")
    before = place.read_bytes()
    place.unlink()
    assert retrain.preprocess(landed.run)["lineage"]["lock"] == landed.run["lineage"]["lock"]
    assert re.search(quoted("… recorded object(s)"), capsys.readouterr().out)
    assert place.read_bytes() == before


def test_a_damaged_object_is_refused_and_its_backup_taken(landed: Landed) -> None:
    path = f"artifacts/{NAME}/dataset/test.parquet"
    place, workspaces = landed.place(path), Context.of(landed.run).workspaces
    shutil.rmtree(landed.project / ".retune/cache", ignore_errors=True)
    whole = place.read_bytes()
    with away(place):
        place.write_bytes(whole[:-1])
        with pytest.raises(IntegrityError, match=quoted("object …")):
            workspaces.read(landed.lineage, path)
    assert workspaces.read(landed.lineage, path) == whole


def test_a_store_without_its_index_and_a_host_without_its_cache_make_the_same_again(landed: Landed) -> None:
    """What the page calls safe to delete is: the stage runs again, and leaves the bytes it left before."""
    for folder in (landed.store / "sections", landed.project / ".retune/cache"):
        shutil.rmtree(folder, ignore_errors=True)
    again = retrain.preprocess(landed.run)["lineage"]
    assert again["lock"] == landed.run["lineage"]["lock"]
    assert list((landed.store / "sections").rglob("*.json"))


@pytest.mark.parametrize(("ledger", "content", "beginning"), [(NAME, b"{", "… is damaged: not"), ("dataset", None, "… is missing")])
def test_a_ledger_that_was_damaged_is_named_until_it_is_restored(
    landed: Landed, ledger: str, content: bytes | None, beginning: str
) -> None:
    entry = landed.store / f"ledger/{ledger}/00000000.json"
    with away(entry):
        if content is not None:
            entry.write_bytes(content)
            with pytest.raises(IntegrityError, match=quoted(beginning)):
                landed.resolve("damaged")
        done = run_module(landed.project, "retune.cli", "ledger", ledger, "--verify", check=False)
        assert done.returncode == 1
        assert re.search(quoted(beginning), " ".join((done.stdout + done.stderr).split()))
        entry.unlink(missing_ok=True)
    assert "verified: " in run_module(landed.project, "retune.cli", "ledger", ledger, "--verify").stdout
    assert landed.resolve("restored")["champion"] == landed.run["champion"]


def test_an_mlflow_without_the_champions_version_is_refused_and_a_backup_that_has_it_taken(landed: Landed) -> None:
    """As one from before the champion was registered."""
    database = landed.project / ".retune/mlflow.db"
    backup = database.read_bytes()
    Registry(Settings.load().tracking_uri, NAME).client.delete_model_version(NAME, landed.run["champion"]["version"])
    (pieces,) = re.findall(r"^- MLflow: `([^`]+)` … `([^`]+)`", GUIDE, re.MULTILINE)
    with pytest.raises(MlflowException, match=".*".join(pieces)):
        landed.resolve("no version")
    database.write_bytes(backup)
    assert landed.resolve("version is back")["champion"]["version"] == landed.run["champion"]["version"]


def test_an_alias_that_was_lost_follows_the_ledger(landed: Landed, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a backup of MLflow from before the promotion, or one of the store from before it."""
    registry = Registry(Settings.load().tracking_uri, NAME)
    registry.client.delete_registered_model_alias(NAME, CHAMPION)
    landed.resolve("no alias")
    assert re.search(quoted("alias …"), capsys.readouterr().out)
    alias = registry.alias(CHAMPION)
    assert alias is not None
    assert str(alias.version) == landed.run["champion"]["version"]


def test_a_store_that_nobody_answers_for_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StageError, match=quoted("is the storage reachable?")) as error:
        Ledger(open_store("s3://retune/store", "http://127.0.0.1:9"), NAME).head()
    assert "http://127.0.0.1:9" in str(error.value)
