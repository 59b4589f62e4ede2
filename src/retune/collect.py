"""What nothing needs any more in the store, and on this host: found by what names what, never by guess.

Kept is every object whose hash stands in an entry of any ledger, in the section index, or in a `data.dvc` or `dvc.lock` of the checkout or
of its git history; and the files of a folder that is kept. This host's cache keeps the same. So every dataset revision, every release
that was judged (champion, previous, and the template alone that each run evaluates) and every stage that can be restored stay whole.
What is younger than a limit stays besides: a run may be about to name it.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from retune.dvc_files import EMPTY_DIR, REMOTE
from retune.errors import IntegrityError, StageError
from retune.ledger import Ledger
from retune.objects import Objects, object_key
from retune.rewritten import Rewritten
from retune.settings import Settings
from retune.store import Store, StoreKeyError

__all__ = ["DAY", "KINDS", "Collectable", "collect", "collectable", "folders"]

DAY = 86_400.0
ABANDONED = 30 * DAY
"""Seconds after which nobody goes on with an interrupted tuning run: data or code have changed, and with them its key."""
KINDS = {
    "objects": "objects that no ledger, section or commit names",
    "checkpoints": "checkpoints of tuning runs that are finished, or were abandoned a month ago",
    "probes": "what is left of trying whether the store creates an object once only",
    "cache": "objects in this host's cache that no ledger, section or commit names",
    "folders": "temporary folders of killed tasks on this host",
}
RESTORE = "restore it from a backup before anything is collected"
BATCH = 500
"""Deletions after which what is named is looked up anew."""
_MD5 = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])(?:\.dir)?")
_OBJECT = re.compile(r"(?:.*/)?files/md5/([0-9a-f]{2})/([0-9a-f]{30}(?:\.dir)?)")
_FOLDERS = tuple(
    f"retune-{use}"
    for use in ["artifacts", "card", "forget", "ingest", "landing", "measure", "model", "new", "plots", "release", "reproduce", "workspace"]
)
"""Temporary folders of the package, without the random end of their names."""


@dataclass(frozen=True)
class Collectable:
    kind: str
    """Of KINDS."""
    key: str
    """In the store; for a folder or an object of the cache its path."""
    size: int
    """Bytes."""


def collectable(store: Store, settings: Settings, older_than: float = DAY, now: float | None = None) -> list[Collectable]:
    """What may go, by kind and key. `older_than`: seconds that it must be old by the storage's clock.

    Raises IntegrityError if a ledger's chain, a section or a kept folder's listing is damaged or missing, StageError if git cannot tell its
    history: then nobody knows what is named.
    """
    limit = (time.time() if now is None else now) - older_than
    keep = _named(store, settings)
    found = []
    for item in store.stored(f"{REMOTE}/files/"):
        # A name that DVC does not give is somebody else's file, and stays.
        if (md5 := _md5(item.key)) and item.modified < limit and md5 not in keep:
            found.append(Collectable("objects", item.key, item.size))
    found += _cached(settings, limit, keep)
    finished = {
        key.split("/")[1] + "/" + key.rpartition("/")[2].removesuffix(".json") for key in store.list("sections/") if "/tune/" in key
    }
    for item in store.stored("checkpoints/"):
        done = item.size == 0 or item.key.removeprefix("checkpoints/") in finished
        if item.modified < (limit if done else min(limit, limit + older_than - ABANDONED)):
            found.append(Collectable("checkpoints", item.key, item.size))
    found += [Collectable("probes", item.key, item.size) for item in store.stored("probe/") if item.modified < limit]
    return found


def folders(older_than: float = DAY, place: Path | None = None, now: float | None = None) -> list[Collectable]:
    """Temporary folders in which nothing was written for that long; a task that is killed cannot remove its own."""
    limit = (time.time() if now is None else now) - older_than
    found = []
    for folder in sorted((place or Path(tempfile.gettempdir())).iterdir()):
        if folder.is_dir() and not folder.is_symlink() and folder.name.rpartition("-")[0] in _FOLDERS:
            states = list(_states(folder))
            if states and max(state.st_mtime for state in states) < limit:
                found.append(Collectable("folders", str(folder), sum(state.st_size for state in states)))
    return found


def collect(store: Store, settings: Settings, planned: Iterable[Collectable], log: Callable[[str], None] = print) -> list[Collectable]:
    """Deletes what was planned, but for objects that were named in the meantime; returns what went."""
    gone = []
    planned = list(planned)
    for batch in (planned[start : start + BATCH] for start in range(0, len(planned), BATCH)):
        # Runs go on meanwhile, and a store may take an hour to clear: what they name is asked for again and again.
        keep = _named(store, settings) if any(item.kind in ("objects", "cache") for item in batch) else set()
        for item in batch:
            if _md5(item.key) in keep:
                log(f"{item.key}: named since it was looked for, so it stays")
                continue
            if item.kind == "folders":
                shutil.rmtree(item.key, ignore_errors=True)
            elif item.kind == "cache":
                Path(item.key).unlink(missing_ok=True)
            else:
                store.delete(item.key)
            gone.append(item)
    return gone


def _md5(place: str) -> str | None:
    """Hash of an object, in the store or the cache; None where DVC gives no such name."""
    match = _OBJECT.fullmatch(place)
    return match[1] + match[2] if match else None


def _cached(settings: Settings, limit: float, keep: set[str]) -> Iterator[Collectable]:
    for path in sorted((settings.cache / "files/md5").glob("??/*")):
        with suppress(FileNotFoundError):
            state = path.lstat()
            if (md5 := _md5(str(path))) and state.st_mtime < limit and md5 not in keep:
                yield Collectable("cache", str(path), state.st_size)


def _states(folder: Path) -> Iterator[os.stat_result]:
    """Of a folder and all in it but what vanishes meanwhile: tasks run beside."""
    with suppress(FileNotFoundError):
        yield folder.lstat()
        for place in folder.iterdir():
            if place.is_dir() and not place.is_symlink():
                yield from _states(place)
            else:
                with suppress(FileNotFoundError):
                    yield place.lstat()


def _named(store: Store, settings: Settings) -> set[str]:
    """Hash of every object that something names, `.dir` included."""
    rewritten = Rewritten.of(store).replaced
    objects = Objects(store, settings.cache)
    named: set[str] = set()
    made: set[str] = set()
    for recorded in _recorded(store):
        named |= _md5s(json.dumps(recorded).encode())
        made |= set(_outs(recorded))
    for text in _by_hand(settings.project):
        named |= _md5s(text)
    for md5 in [md5 for md5 in named if md5.endswith(".dir") and md5 not in {*rewritten, EMPTY_DIR}]:
        try:
            listed = objects.get(md5)
        except StoreKeyError:
            if md5 in made:
                raise IntegrityError(f"{object_key(md5)} is missing, a listing that is recorded; {RESTORE}") from None
            continue  # a folder that a stage read, such as its code; or what a commit names and nobody pushed
        except IntegrityError as error:
            raise IntegrityError(f"{error}; nothing is collected") from None
        named |= {file["md5"] for file in json.loads(listed)}
    return named


def _md5s(text: bytes) -> set[str]:
    return {md5.decode() for md5 in _MD5.findall(text)}


def _outs(value: Any) -> Iterator[str]:
    """Hash of each output that an entry or section names, wherever it stands in it."""
    if isinstance(value, Mapping):
        yield from (out["md5"] for out in value.get("outs") or [])
        for key, inner in value.items():
            yield from _outs_of(inner) if key in ("data", "lock") and isinstance(inner, str) else _outs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _outs(inner)


@cache
def _outs_of(text: str) -> tuple[str, ...]:
    """Those of a data.dvc or dvc.lock; the same one is read many times, and YAML is slow."""
    return tuple(_outs(yaml.safe_load(text)))


def _recorded(store: Store) -> Iterator[Any]:
    """Entries of all ledgers, and the section index."""
    for name in sorted({key.removeprefix("ledger/").rpartition("/")[0] for key in store.list("ledger/")}):
        for entry in Ledger(store, name).entries():  # verified: a damaged entry must not cost what it named
            yield entry.body
    for key in store.list("sections/"):
        try:
            text = store.get(key)
        except StoreKeyError:
            continue  # deleted since it was listed
        try:
            section = json.loads(text)["section"]
        except (ValueError, KeyError, TypeError):
            raise IntegrityError(f"{key} is damaged; delete it, so that its stage runs again, or {RESTORE}") from None
        yield section


def _by_hand(project: Path) -> Iterator[bytes]:
    """What the checkout and its commits say, of data that somebody pushed by hand."""
    for file in ("data.dvc", "dvc.lock"):
        if (project / file).is_file():
            yield (project / file).read_bytes()
    if not any((folder / ".git").exists() for folder in (project, *project.parents)):
        return
    history = ["git", "log", "--all", "--format=", "-p", "--", "data.dvc", "dvc.lock"]
    try:
        done = subprocess.run(history, cwd=project, capture_output=True, check=False)
    except OSError as error:
        raise StageError(f"{project} is a git checkout, and its history names what was pushed, but git does not start: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise StageError(f"git cannot tell what the history of {project} names, so nothing is collected: {said}")
    yield done.stdout
