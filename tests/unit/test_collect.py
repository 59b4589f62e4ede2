"""`retune gc`: what is named stays, whoever names it; what is young stays; the rest may go."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from checkouts import ROOT
from forgetting import PROMPT
from typer.testing import CliRunner

from retune.cli import app
from retune.collect import ABANDONED, DAY, Collectable, collect, collectable, folders
from retune.config import load_prompt
from retune.dvc_files import EMPTY_DATA, lock_text, md5_of, object_name, sections
from retune.errors import IntegrityError, StageError
from retune.ledger import Ledger
from retune.objects import Objects, object_key
from retune.settings import Settings
from retune.store import Store, StoreKeyError, open_store
from retune.workspace import Workspaces

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


@pytest.mark.parametrize("damaged", ["ledger", "listing", "missing listing", "section", "another listing"])
def test_nothing_goes_while_nobody_can_tell_what_is_named(store: Store, settings: Settings, damaged: str) -> None:
    objects = Objects(store, settings.cache)
    listing = objects.put_listing({"p/a.parquet": put(store, settings, b"part")})
    other = objects.put_listing({"p/b.parquet": put(store, settings, b"another")})
    entry = Ledger(store, "dataset").append("revision", "t", "first", {"data": data_dvc(listing)}, None)
    Ledger(store, "dataset").append("revision", "t", "second", {"data": data_dvc(listing)}, entry)
    key = f"sections/p/tune/{'a' * 64}.json"
    # What a stage read is no object: a folder of code.
    section = {"deps": [{"path": "src", "md5": "e" * 32 + ".dir"}], "outs": []}
    store.put(key, json.dumps({"section": section}).encode())
    age(settings)
    assert keys(collectable(store, settings)) == {object_key(other), object_key(md5_of(b"another"))}
    if damaged == "missing listing":
        store.delete(object_key(listing))
    elif damaged == "another listing":
        store.put(object_key(listing), store.get(object_key(other)))
    else:
        store.put({"ledger": "ledger/dataset/00000000.json", "section": key}.get(damaged, object_key(listing)), b'[{"md5')
    age(settings)
    with pytest.raises(IntegrityError, match="restore it from a backup"):
        collectable(store, settings)


def test_a_history_that_git_cannot_tell_is_not_taken_for_none(store: Store, settings: Settings) -> None:
    put(store, settings, b"named by a commit, for all that is known")
    age(settings)
    (settings.project / ".git").write_text("gitdir: /nowhere")
    with pytest.raises(StageError, match="nothing is collected"):
        collectable(store, settings)


def test_a_listing_that_a_commit_names_and_nobody_pushed_is_no_damage(store: Store, settings: Settings) -> None:
    (settings.project / "data.dvc").write_text(data_dvc("f" * 32 + ".dir"))
    orphan = put(store, settings, b"orphan")
    age(settings)
    assert keys(collectable(store, settings)) == {object_key(orphan)}


def test_what_a_run_in_flight_resolved_is_named_before_its_first_entry(store: Store, settings: Settings) -> None:
    """A tuning run and an approval may take weeks; and what an earlier run left may be old when this one puts it again."""
    write_project(settings)
    prompt = load_prompt(settings.prompts / "p.yaml")
    workspaces = Workspaces(settings, lambda _: None)
    workspaces.objects.put_listing({})
    Ledger(store, "dataset").append("revision", "t", "first", {"data": EMPTY_DATA}, None)
    lineage = workspaces.known(prompt, workspaces.lineage(EMPTY_DATA, 0))
    section = sections(lineage.lock)["resolve@p"]
    md5s = [section["outs"][0]["md5"], next(dep["md5"] for dep in section["deps"] if dep["path"] == "prompts/p.yaml")]
    age(settings, ABANDONED)
    assert keys(collectable(store, settings)) == set()
    for key in store.list("sections/"):
        store.delete(key)
    assert keys(collectable(store, settings)) == {object_key(md5) for md5 in md5s}
    workspaces.known(prompt, workspaces.lineage(EMPTY_DATA, 0))
    for key in store.list("sections/"):
        store.delete(key)
    assert keys(collectable(store, settings)) == set(), "put again, so young"


def write_project(settings: Settings) -> None:
    (settings.project / "prompts").mkdir()
    (settings.project / "prompts/p.yaml").write_text(yaml.safe_dump(PROMPT))
    (settings.project / "requirements.lock").write_text("")
    shutil.copy(ROOT / "dvc.yaml", settings.project)
    for dep in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        for path in dep["do"]["deps"]:
            place = settings.project / path
            if path.startswith("src/") and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, place)


def test_what_is_named_while_a_large_store_is_cleared_stays(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each batch it is asked anew what is named."""
    monkeypatch.setattr("retune.collect.BATCH", 1)
    first, second = sorted((put(store, settings, b"one"), put(store, settings, b"two")))
    age(settings)
    planned = collectable(store, settings)
    real = store.delete

    def delete(key: str) -> None:
        real(key)
        store.put(f"sections/p/tune/{'a' * 64}.json", json.dumps({"section": {"outs": [{"path": "y", "md5": second}]}}).encode())

    monkeypatch.setattr(store, "delete", delete)
    assert keys(collect(store, settings, planned, lambda _: None)) == {object_key(first)}
    assert store.exists(object_key(second))


def test_this_hosts_cache_keeps_what_is_named_and_what_is_young(store: Store, settings: Settings) -> None:
    kept = put(store, settings, b"kept")
    (settings.project / "data.dvc").write_text(data_dvc(kept))
    places = {content: settings.cache / object_name(md5_of(content)) for content in (b"kept", b"hers", b"young")}
    for content, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        if content != b"young":
            os.utime(place, (time.time() - TEN_DAYS,) * 2)
    found = [item for item in collectable(store, settings) if item.kind == "cache"]
    assert keys(found) == {str(places[b"hers"])}
    collect(store, settings, found)
    assert [place.exists() for place in places.values()] == [True, False, True]


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


def test_a_folder_that_vanishes_while_it_is_looked_at_is_no_failure(tmp_path: Path) -> None:
    """A task beside removes its own; a dangling entry stands for a file that went between listing and look."""
    (tmp_path / "retune-artifacts-x").mkdir()
    then = time.time() - TEN_DAYS
    os.utime(tmp_path / "retune-artifacts-x", (then, then))
    assert [Path(item.key).name for item in folders(place=tmp_path)] == ["retune-artifacts-x"]
    gone = tmp_path / "retune-workspace-y"
    gone.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        real = Path.is_symlink
        # The last thing asked of it before it is looked at; on the way there, its task ends.
        patch.setattr(Path, "is_symlink", lambda path: (path == gone and gone.exists() and gone.rmdir()) or real(path))
        assert [Path(item.key).name for item in folders(place=tmp_path)] == ["retune-artifacts-x"]


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
