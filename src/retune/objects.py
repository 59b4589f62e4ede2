"""Tracked files straight from the content-addressed remote, or from the host's cache before it; the hash of every byte verified."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

from retune.dvc_files import REMOTE, listing, md5_of, object_name, outs, relative, safe
from retune.errors import IntegrityError
from retune.records import Lineage
from retune.store import Store

__all__ = ["Objects", "object_key"]


class Objects:
    """The remote of one store and the cache of one host."""

    def __init__(self, store: Store, cache: Path) -> None:
        self._store = store
        self._cache = cache

    def files(self, lineage: Lineage, path: str) -> dict[str, str]:
        """Files under a tracked path: relative path ("" for a file itself) -> md5.

        Raises IntegrityError if the lineage does not know the path.
        """
        for out in outs(lineage):
            inside = relative(path, out["path"])
            if inside is None:
                continue
            if not out["md5"].endswith(".dir"):
                return {"": out["md5"]}
            found = {item["relpath"]: item["md5"] for item in json.loads(self.get(out["md5"]))}
            if inside == "":
                return found
            if inside in found:
                return {"": found[inside]}
            return {name[len(inside) + 1 :]: md5 for name, md5 in found.items() if name.startswith(inside + "/")}
        raise IntegrityError(f"lineage does not track {path!r}")

    def read(self, lineage: Lineage, path: str) -> bytes:
        """One tracked file. Raises IntegrityError if it is not one, or not the recorded bytes."""
        files = self.files(lineage, path)
        if set(files) != {""}:
            raise IntegrityError(f"{path!r} is not one file in this lineage but {len(files)}")
        return self.get(files[""])

    def fetch(self, lineage: Lineage, path: str, target: Path) -> Path:
        """Lays a tracked folder's files under `target`, or a tracked file at it. Raises as `read` does."""
        for name, md5 in self.files(lineage, path).items():
            place = target / safe(name) if name else target
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(self.get(md5))
        return target

    def get(self, md5: str) -> bytes:
        """An object's bytes. Raises IntegrityError if the remote's are others, StoreKeyError if it has none."""
        name = object_name(md5)
        if (cached := self._cached(md5)) is not None:
            return cached
        data = self._store.get(object_key(md5))
        if md5_of(data) != md5.removesuffix(".dir"):
            data = self._store.get(object_key(md5))  # an answer that was cut on its way is whole the second time
        found = md5_of(data)
        if found != md5.removesuffix(".dir"):
            raise IntegrityError(
                f"object {name} in the store has hash {found}: it was changed or cut after it was pushed; restore it from a backup"
            )
        return data

    def _cached(self, md5: str) -> bytes | None:
        """An object's bytes from the host's cache; None where it is not there, or damaged."""
        place = self._cache / object_name(md5)
        data = place.read_bytes() if place.is_file() else None
        return data if data is not None and md5_of(data) == md5.removesuffix(".dir") else None

    def put(self, content: bytes) -> None:
        """Puts a file's content into the remote, even where it is there: it may be so old that `retune gc` is about to delete it."""
        self._store.put(object_key(md5_of(content)), content)

    def put_listing(self, files: Mapping[str, str]) -> str:
        """Puts DVC's listing of a folder (relative path -> md5) into the remote and returns its hash."""
        body = listing(files)
        md5 = md5_of(body) + ".dir"
        self._store.put(object_key(md5), body)
        return md5

    def missing(self, md5s: Iterable[str]) -> list[str]:
        """Those that the remote does not hold."""
        return [md5 for md5 in md5s if not self._store.exists(object_key(md5))]

    def verify(self, md5: str) -> None:
        """Reads an object back from the remote. Raises IntegrityError if it is not what was pushed."""
        if not self._store.exists(object_key(md5)):
            # DVC pushes a folder's listing last, and takes a listing that is there for all of its files; one may be lost since.
            self._store.put(object_key(md5), self.get(md5))
        found = self._store.md5(object_key(md5))
        if found != md5.removesuffix(".dir"):
            found = self._store.md5(object_key(md5))  # an answer that was cut on its way is whole the second time
        if found != md5.removesuffix(".dir") and (whole := self._cached(md5)) is not None:
            self._store.put(object_key(md5), whole)  # DVC takes an object that is there for whole, and pushes it no second time
            found = self._store.md5(object_key(md5))
        if found != md5.removesuffix(".dir"):
            raise IntegrityError(f"{object_key(md5)} was pushed but reads back as {found}; look at the store's health and run again")

    def drop_damaged(self, md5s: Iterable[str]) -> list[str]:
        """Removes what is not what its name says from the host's cache, and returns it: DVC trusts whatever is read-only there."""
        damaged = []
        for md5 in md5s:
            place = self._cache / object_name(md5)
            if place.is_file() and _file_md5(place) != md5.removesuffix(".dir"):
                place.unlink(missing_ok=True)
                damaged.append(md5)
        return damaged

    def keep_listing(self, files: Mapping[str, str]) -> str:
        """Puts DVC's listing of a folder (relative path -> md5) into the host's cache and returns its hash."""
        body = listing(files)
        md5 = md5_of(body) + ".dir"
        place = self._cache / object_name(md5)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{place.name}.{uuid4().hex}.tmp")  # containers that share a cache have the same process ids
        temporary.write_bytes(body)
        temporary.replace(place)
        return md5


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def object_key(md5: str) -> str:
    """Where the store keeps an object."""
    return f"{REMOTE}/{object_name(md5)}"
