"""What Retune knows of DVC's files: sections of dvc.lock, listings of folders, names of objects. Pure, and without DVC."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from retune.errors import IntegrityError
from retune.records import Lineage

__all__ = [
    "EMPTY_DATA",
    "EMPTY_DIR",
    "REMOTE",
    "entry",
    "lay",
    "listing",
    "lock_text",
    "md5_of",
    "object_name",
    "outs",
    "path_md5",
    "relative",
    "safe",
    "sections",
]

REMOTE = "dvc"
"""Prefix of the DVC remote in the store."""
EMPTY_DIR = "d751713988987e9331980363e24189ce.dir"
"""DVC's hash of a folder without files."""
EMPTY_DATA = yaml.safe_dump({"outs": [{"md5": EMPTY_DIR, "size": 0, "nfiles": 0, "hash": "md5", "path": "data"}]}, sort_keys=False)
"""Text of a data.dvc that holds nothing yet."""


def sections(lock: str) -> dict[str, dict[str, Any]]:
    """Sections of a dvc.lock by stage, such as `tune@ticket_priority`."""
    return (yaml.safe_load(lock) or {}).get("stages", {}) if lock else {}


def lock_text(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Text of the dvc.lock that holds these sections."""
    return yaml.safe_dump({"schema": "2.0", "stages": {name: dict(section) for name, section in stages.items()}}, sort_keys=False)


def lay(lineage: Lineage, name: str, section: Mapping[str, Any]) -> Lineage:
    """The lineage with one section put in, at the place of an earlier one of that name."""
    return replace(lineage, lock=lock_text({**sections(lineage.lock), name: section}))


def outs(lineage: Lineage) -> Iterator[dict[str, Any]]:
    """Every tracked path of a lineage, as data.dvc and dvc.lock name it."""
    yield from (yaml.safe_load(lineage.data) or {}).get("outs", [])
    for section in sections(lineage.lock).values():
        yield from section.get("outs", [])


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as dvc.lock names it."""
    return {"path": path, "hash": "md5", "md5": md5_of(content), "size": len(content)}


def md5_of(content: bytes) -> str:
    """The hash by which DVC names content; it stands for integrity, not for secrecy."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def listing(files: Mapping[str, str]) -> bytes:
    """DVC's listing of a folder, the object that a `.dir` hash names. files: relative path -> md5."""
    return json.dumps([{"md5": files[name], "relpath": name} for name in sorted(files)]).encode()


def path_md5(place: Path) -> str:
    """DVC's hash of a file or folder in the working tree; what .dvcignore names does not count.

    Raises IntegrityError if it does not exist.
    """
    if place.is_file():
        return md5_of(place.read_bytes())
    if not place.is_dir():
        raise IntegrityError(f"{place} does not exist")
    files = {p.relative_to(place).as_posix(): p for p in place.rglob("*") if p.is_file()}
    counted = {name: p for name, p in files.items() if "__pycache__" not in p.parts and p.suffix != ".pyc"}
    return md5_of(listing({name: md5_of(p.read_bytes()) for name, p in counted.items()})) + ".dir"


def object_name(md5: str) -> str:
    """Where a cache or remote keeps an object."""
    return f"files/md5/{md5[:2]}/{md5[2:]}"


def relative(path: str, parent: str) -> str | None:
    """`path` relative to `parent`: "" if they are the same, None if it is not inside."""
    if path == parent:
        return ""
    return path[len(parent) + 1 :] if path.startswith(parent + "/") else None


def safe(name: str) -> PurePosixPath:
    """A relative path that stays inside. Raises IntegrityError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise IntegrityError(f"path {name!r} must be relative and stay inside its folder")
    return path
