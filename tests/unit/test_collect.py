"""`retune gc`: what is named stays, whoever names it; what is young stays; the rest may go."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from retune.cli import app
from retune.collect import ABANDONED, DAY, Collectable, collect, collectable, folders
from retune.dvc_files import lock_text, md5_of
from retune.errors import IntegrityError
from retune.ledger import Ledger
from retune.objects import Objects, object_key
from retune.settings import Settings
from retune.store import Store, StoreKeyError, open_store

TEN_DAYS = 10 * DAY


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_CACHE", "RETUNE_PROMPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RETUNE_PROJECT", str(tmp_path))
    return Settings.load()


@pytest.fixture
def store(settings: Settings) -> Store:
    return open_store(settings)


def put(store: Store, settings: Settings, content: bytes) -> str:
    Objects(store, settings.cache).put(content)
    return md5_of(content)


def data_dvc(md5: str) -> str:
    return f"outs:\n- md5: {md5}\n  hash: md5\n  path: data\n"


def age(settings: Settings, seconds: float = TEN_DAYS) -> None:
    then = time.time() - seconds
    for path in Path(settings.store).rglob("*"):
        os.utime(path, (then, then))


def keys(found: list[Collectable]) -> set[str]:
    return {item.key for item in found}


def test_what_a_ledger_section_checkout_or_commit_names_stays_and_the_rest_may_go(store: Store, settings: Settings) -> None:
    objects = Objects(store, settings.cache)
    part, release, restored, here, committed, orphan = (put(store, settings, name) for name in (b"part", b"r", b"s", b"h", b"c", b"orphan"))
    listing = objects.put_listing({"p/a.parquet": part})
    earlier = objects.put_listing({"p/b.parquet": put(store, settings, b"part of before")})
    head = Ledger(store, "dataset").append("revision", "t", "first", {"data": data_dvc(earlier)}, None)
    Ledger(store, "dataset").append("revision", "t", "second", {"data": data_dvc(listing)}, head)
    lineage = {"data": data_dvc(listing), "lock": lock_text({"tune@p": {"outs": [{"path": "x", "md5": release}]}})}
    Ledger(store, "p").append("hold", "t", "no gain", {"champion": {"release": "f" * 64}, "lineage": lineage}, None)
    store.put(f"sections/p/tune/{'a' * 64}.json", json.dumps({"section": {"outs": [{"path": "y", "md5": restored}]}}).encode())
    for text, commit in ((lock_text({"a@p": {"outs": [{"path": "z", "md5": committed}]}}), True), (data_dvc(here), False)):
        (settings.project / ("dvc.lock" if commit else "data.dvc")).write_text(text)
        if commit:
            identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
            for command in (["init", "-q"], ["add", "dvc.lock"], [*identity, "commit", "-qm", "by hand"]):
                subprocess.run(["git", *command], cwd=settings.project, check=True)
            (settings.project / "dvc.lock").unlink()
    age(settings)
    found = collectable(store, settings)
    assert keys(found) == {object_key(orphan)}
    assert [item.size for item in found] == [len(b"orphan")]
    collect(store, settings, found)
    with pytest.raises(StoreKeyError):
        store.get(object_key(orphan))
    assert objects.missing([part, release, restored, here, committed, listing, earlier]) == []
    assert collectable(store, settings) == []


def test_what_is_young_stays(store: Store, settings: Settings) -> None:
    old = put(store, settings, b"old")
    age(settings)
    put(store, settings, b"young")
    store.put("probe/young", b"0")
    assert keys(collectable(store, settings)) == {object_key(old)}
    assert collectable(store, settings, older_than=TEN_DAYS + DAY) == []
    assert len(collectable(store, settings, older_than=0, now=time.time() + 1)) == 3


def test_what_is_named_between_plan_and_deletion_stays(store: Store, settings: Settings) -> None:
    """A run that was about to restore an old object says so while the store is being looked through."""
    wanted, orphan = put(store, settings, b"wanted"), put(store, settings, b"orphan")
    age(settings)
    planned = collectable(store, settings)
    assert keys(planned) == {object_key(wanted), object_key(orphan)}
    store.put(f"sections/p/tune/{'a' * 64}.json", json.dumps({"section": {"outs": [{"path": "y", "md5": wanted}]}}).encode())
    said: list[str] = []
    assert keys(collect(store, settings, planned, said.append)) == {object_key(orphan)}
    assert store.get(object_key(wanted)) == b"wanted"
    assert said == [f"{object_key(wanted)}: named since it was looked for, so it stays"]


def test_checkpoints_go_when_their_run_is_over(store: Store, settings: Settings) -> None:
    """One that is empty led to a release; one whose key is in the index did too; another run may still go on, for a month."""
    finished, indexed, running = "a" * 64, "b" * 64, "c" * 64
    store.put(f"checkpoints/p/{finished}", b"")
    for key in (indexed, running):
        store.put(f"checkpoints/p/{key}", b"state")
    store.put(f"sections/p/tune/{indexed}.json", b'{"section": {"outs": []}}')
    age(settings)
    assert keys(collectable(store, settings)) == {f"checkpoints/p/{finished}", f"checkpoints/p/{indexed}"}
    age(settings, ABANDONED + DAY)
    assert f"checkpoints/p/{running}" in keys(collectable(store, settings))
    assert f"checkpoints/p/{running}" not in keys(collectable(store, settings, older_than=ABANDONED + 2 * DAY))


@pytest.mark.parametrize("damaged", ["ledger", "listing"])
def test_nothing_goes_while_nobody_can_tell_what_is_named(store: Store, settings: Settings, damaged: str) -> None:
    listing = Objects(store, settings.cache).put_listing({"p/a.parquet": put(store, settings, b"part")})
    entry = Ledger(store, "dataset").append("revision", "t", "first", {"data": data_dvc(listing)}, None)
    Ledger(store, "dataset").append("revision", "t", "second", {"data": data_dvc(listing)}, entry)
    store.put("ledger/dataset/00000000.json" if damaged == "ledger" else object_key(listing), b'[{"md5')
    age(settings)
    with pytest.raises(IntegrityError, match="restore it from a backup"):
        collectable(store, settings)


def test_files_of_others_stay(store: Store, settings: Settings) -> None:
    store.put("dvc/files/md5/ab/readme.txt", b"mine")
    store.put("notes/plan.md", b"mine")
    age(settings)
    assert collectable(store, settings) == []


def test_temporary_folders_of_killed_tasks_go_when_nothing_was_written_in_them_for_long(tmp_path: Path) -> None:
    for name in ("retune-workspace-abc_1", "retune-ingest-x", "retune-workspace-used", "others-workspace-x", "retune-notes-x"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner/file").write_bytes(b"12345")
    then = time.time() - TEN_DAYS
    for path in tmp_path.rglob("*"):
        if path != tmp_path / "retune-workspace-used/inner/file":
            os.utime(path, (then, then))
    assert {Path(item.key).name for item in folders(place=tmp_path)} == {"retune-workspace-abc_1", "retune-ingest-x"}


def test_a_dry_run_prints_what_would_go_and_deletes_nothing(store: Store, settings: Settings) -> None:
    orphan = put(store, settings, b"orphan")
    store.put("probe/x", b"0")
    age(settings)
    for options, left in ((["--dry-run"], True), (["--older-than", "11"], True), ([], False)):
        done = CliRunner().invoke(app, ["gc", "--json", *options])
        assert done.exit_code == 0, done.output
        shown = json.loads(done.stdout)
        count = 0 if options == ["--older-than", "11"] else 1
        assert shown["kinds"]["objects"] == {"count": count, "bytes": count * len(b"orphan")}
        assert shown["kinds"]["probes"]["count"] == count
        assert shown["dry_run"] == (options == ["--dry-run"])
        assert store.exists(object_key(orphan)) == left
    assert "0 bytes" in CliRunner().invoke(app, ["gc"]).output
