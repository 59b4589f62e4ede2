"""`retune gc` on what real stages left: whatever its limit, everything that is named can still be restored."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checkouts import environment_of, run
from small import NAME
from typer.testing import CliRunner

from retune.cli import app
from retune.config import load_prompt
from retune.ledger import Ledger
from retune.objects import Objects, object_key
from retune.records import Lineage
from retune.rewritten import Rewritten
from retune.settings import Settings
from retune.store import open_store
from retune.workspace import STAGES, Workspaces

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def kept(small: Path) -> Iterator[Path]:
    with environment_of(small):
        yield small


def test_without_a_limit_only_what_nothing_names_goes_and_a_run_restores_every_stage(kept: Path) -> None:
    store, settings = open_store(Settings.load()), Settings.load()
    Objects(store, settings.cache).put(b"left by a run that was killed")
    store.put("probe/x", b"0")
    before = set(store.list())
    done = CliRunner().invoke(app, ["gc", "--older-than", "0", "--json"])
    assert done.exit_code == 0, done.output
    gone = before - set(store.list())
    assert {key for key in gone if key.startswith("dvc/")} == {object_key(md5) for md5 in orphans(before, gone)}
    assert "probe/x" in gone
    assert not [key for key in gone if key.startswith(("ledger/", "sections/"))]
    last = Rewritten.of(store).current(Lineage.from_json(Ledger(store, NAME).entries()[-1].body["lineage"]))
    workspaces = Workspaces(settings, lambda _: None)
    lineage = workspaces.lineage(last.data, last.revision)
    for stage in STAGES:
        done_again = workspaces.run(stage, load_prompt(settings.prompts / f"{NAME}.yaml"), lineage)
        assert done_again.restored, stage
        lineage = done_again.lineage
    for entry in Ledger(store, NAME).entries():
        assert workspaces.objects.missing(out["md5"] for out in (entry.body.get("champion") or {}).get("outs", [])) == []


def orphans(before: set[str], gone: set[str]) -> set[str]:
    """md5s of what went, each of which nothing in the store names: not by chance, but by searching all of its text."""
    store = open_store(Settings.load())
    texts = b"".join(store.get(key) for key in before - gone if key.startswith(("ledger/", "sections/")))
    md5s = {key.removeprefix("dvc/files/md5/").replace("/", "") for key in gone if key.startswith("dvc/")}
    assert md5s
    assert not [md5 for md5 in md5s if md5.encode() in texts]
    return md5s


def test_data_of_every_revision_can_be_pulled_afterwards(kept: Path) -> None:
    """The store is asked as well: another module may have pulled the data into the checkout's own cache."""
    store, settings = open_store(Settings.load()), Settings.load()
    workspaces, rewritten = Workspaces(settings, lambda _: None), Rewritten.of(store)
    for entry in Ledger(store, "dataset").entries():
        lineage = rewritten.current(workspaces.lineage(entry.body["data"], entry.n))
        (listing,) = yaml.safe_load(lineage.data)["outs"]
        assert workspaces.objects.missing([listing["md5"], *workspaces.files(lineage, "data").values()]) == []
    for n in range(len(Ledger(open_store(Settings.load()), "dataset").entries())):
        laid = CliRunner().invoke(app, ["checkout", "--data", str(n), "--force", "--json"])
        assert laid.exit_code == 0, laid.output
        assert json.loads(laid.stdout)["revision"] == n
        run(kept, "dvc", "pull", "-q", "--force", "data.dvc")
