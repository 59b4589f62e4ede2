"""What nothing needs any more in the store, and on this host: found by what names what, never by guess.

Kept is every object whose hash stands in an entry of any ledger, in the section index, or in a `data.dvc` or `dvc.lock` of the checkout or
of its git history; and the files of a folder that is kept. So every dataset revision, every release that was judged (champion, previous,
and the template alone that each run evaluates) and every stage that can be restored stay whole. What is younger than a limit stays
besides: a run may be about to name it.
"""

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retune.dvc_files import REMOTE
from retune.errors import IntegrityError
from retune.ledger import Ledger
from retune.objects import object_key
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
    "probes": "what `retune doctor` left when it tried the store",
    "folders": "temporary folders of killed tasks on this host",
}
_MD5 = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])(?:\.dir)?")
_OBJECT = re.compile(rf"{REMOTE}/files/md5/([0-9a-f]{{2}})/([0-9a-f]{{30}}(?:\.dir)?)")
_FOLDERS = tuple(
    f"retune-{use}" for use in ["card", "forget", "ingest", "landing", "measure", "model", "plots", "release", "reproduce", "workspace"]
)
"""Temporary folders of the package, without the random end of their names."""


@dataclass(frozen=True)
class Collectable:
    kind: str
    """Of KINDS."""
    key: str
    """In the store; for a folder its path."""
    size: int
    """Bytes."""


def collectable(store: Store, settings: Settings, older_than: float = DAY, now: float | None = None) -> list[Collectable]:
    """What may go, by kind and key. `older_than`: seconds that it must be old by the storage's clock.

    Raises IntegrityError if a ledger's chain or a kept folder's listing is damaged: then nobody knows what it names.
    """
    limit = (time.time() if now is None else now) - older_than
    keep = _named(store, settings)
    found = []
    for item in store.stored(f"{REMOTE}/"):
        match = _OBJECT.fullmatch(item.key)
        # A name that DVC does not give is somebody else's file, and stays.
        if match and item.modified < limit and (match[1] + match[2]) not in keep:
            found.append(Collectable("objects", item.key, item.size))
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
            states = [path.lstat() for path in (folder, *folder.rglob("*"))]
            if max(state.st_mtime for state in states) < limit:
                found.append(Collectable("folders", str(folder), sum(state.st_size for state in states)))
    return found


def collect(store: Store, settings: Settings, planned: Iterable[Collectable], log: Callable[[str], None] = print) -> list[Collectable]:
    """Deletes what was planned, but for objects that were named in the meantime; returns what went."""
    planned = list(planned)
    keep = _named(store, settings) if any(item.kind == "objects" for item in planned) else set()
    gone = []
    for item in planned:
        if item.kind == "folders":
            shutil.rmtree(item.key, ignore_errors=True)
        elif (match := _OBJECT.fullmatch(item.key)) and (match[1] + match[2]) in keep:
            log(f"{item.key}: named since it was looked for, so it stays")
            continue
        else:
            store.delete(item.key)
        gone.append(item)
    return gone


def _named(store: Store, settings: Settings) -> set[str]:
    """Hash of every object that something names, `.dir` included."""
    rewritten = Rewritten.of(store).replaced
    named: set[str] = set()
    for text in _texts(store, settings.project):
        named |= {md5.decode() for md5 in _MD5.findall(text)}
    for md5 in [md5 for md5 in named if md5.endswith(".dir") and md5 not in rewritten]:
        named |= {file["md5"] for file in _listing(store, md5)}
    return named


def _texts(store: Store, project: Path) -> Iterator[bytes]:
    """Whatever may name an object."""
    for name in sorted({key.removeprefix("ledger/").rpartition("/")[0] for key in store.list("ledger/")}):
        for entry in Ledger(store, name).entries():  # verified: a damaged entry must not cost what it named
            yield json.dumps(entry.body).encode()
    for key in store.list("sections/"):
        try:
            yield store.get(key)
        except StoreKeyError:
            continue  # deleted since it was listed
    for file in ("data.dvc", "dvc.lock"):
        if (project / file).is_file():
            yield (project / file).read_bytes()
    try:
        history = ["git", "log", "--all", "--format=", "-p", "--", "data.dvc", "dvc.lock"]
        yield subprocess.run(history, cwd=project, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return  # no git, no history


def _listing(store: Store, md5: str) -> list[dict[str, Any]]:
    try:
        content = store.get(object_key(md5))
    except StoreKeyError:
        return []
    try:
        files: list[dict[str, Any]] = json.loads(content)
        return [{"md5": file["md5"]} for file in files]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{object_key(md5)} is damaged ({error!r}); restore it from a backup before anything is collected") from None
