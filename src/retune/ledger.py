"""Append-only lists of decisions in the store, one per prompt and one of dataset revisions.

Entry n of a ledger is the object `ledger/<name>/<n:08d>.json`: canonical JSON that holds the sha256 of entry n - 1's bytes. Who
appends names the head that the decision was taken on; if somebody else was first, the append fails and nothing is written.
"""

import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from retune.config import canonical_json
from retune.errors import ConfigError, ConflictError, IntegrityError
from retune.store import Store, StoreKeyError

__all__ = ["Entry", "Ledger", "Standing", "decided", "looks_before", "spent_before", "standing"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(/[a-z0-9][a-z0-9_-]*)*")
_ENTRY = re.compile(r"\d{8}\.json")
_FIELDS: dict[str, Any] = {"n": int, "previous": str | None, "at": str, "kind": str, "by": str, "reason": str, "attempt": str}
_DECISIONS = ("promote", "hold", "reject")
_READERS = 16
"""Entries that are read at the same time."""


@dataclass(frozen=True)
class Entry:
    """One decision, as it stands in the store."""

    n: int
    sha256: str
    """Of the entry's bytes; the next entry holds it."""
    previous: str | None
    """sha256 of the entry before; None for the first."""
    at: str
    """ISO 8601, UTC, with a Z, by the clock of whoever appended."""
    kind: str
    by: str
    reason: str
    body: dict[str, Any]
    """What the kind of entry carries, `champion` among it."""


class Ledger:
    """The ledger `name` of a store."""

    def __init__(self, store: Store, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"a ledger's name must be lower-case letters, digits, '_', '-' and '/', got {name!r}")
        self.name = name
        self._store = store

    def entries(self) -> list[Entry]:
        """Every entry, first to last, the chain verified.

        Raises IntegrityError naming the first entry that is missing, damaged or not the one that its successor recorded.
        """
        entries, broken = self.survey()
        if broken:
            raise IntegrityError(broken[min(broken)])
        return entries

    def survey(self) -> tuple[list[Entry], dict[int, str]]:
        """Every entry that can be read, first to last, and what is wrong with each at which the chain does not hold, by number."""
        last = self._last()
        with ThreadPoolExecutor(_READERS) as readers:
            found = list(readers.map(self._tried, range(last + 1)))
        entries = [each for each in found if isinstance(each, Entry)]
        broken = {n: str(each) for n, each in enumerate(found) if isinstance(each, IntegrityError)}
        for before, entry in itertools.pairwise(entries):
            if before.n == entry.n - 1:
                try:
                    self._follows(entry, before)
                except IntegrityError as error:
                    broken[before.n] = str(error)
        return entries, broken

    def head(self) -> Entry | None:
        """The last entry, verified against the one before it; None for an empty ledger. A listing and two small reads.

        Raises IntegrityError if one of the two is missing or damaged.
        """
        last = self._last()
        if last < 0:
            return None
        entry = self._read(last)
        if last > 0:
            self._follows(entry, self._read(last - 1))
        return entry

    def append(self, kind: str, by: str, reason: str, body: Mapping[str, Any], expected: Entry | None) -> Entry:
        """Appends a decision that was taken on the head `expected` (None: on an empty ledger).

        Raises ConflictError if that is not the head any more: read the ledger and decide again. Raises IntegrityError if the store
        does not hold `expected`, ValueError for a body that is not plain JSON or uses an entry's own field names.
        """
        if reserved := sorted(_FIELDS.keys() & body.keys()):
            raise ValueError(f"body must not hold an entry's own fields, got {', '.join(reserved)}")
        if expected is not None and self._read(expected.n).sha256 != expected.sha256:
            raise IntegrityError(f"{self._where(expected.n)} is not the one that this decision was taken on: the store was replaced")
        document = {
            "n": 0 if expected is None else expected.n + 1,
            "previous": None if expected is None else expected.sha256,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "kind": kind,
            "by": by,
            "reason": reason,
            "attempt": secrets.token_hex(8),  # no two attempts are equal, so one whose answer was lost knows its own entry
            "champion": None,
            **body,
        }
        data = canonical_json(document)
        entry = self._parse(document["n"], data)
        try:
            self._store.create(self._key(entry.n), data)
        except ConflictError:
            raise ConflictError(
                f"ledger {self.name}: somebody else appended entry {entry.n} while this {kind} was decided; read it and decide again"
            ) from None
        return entry

    def verify(self) -> int:
        """Reads the whole chain, and returns the number of entries. Raises IntegrityError as `entries` does."""
        return len(self.entries())

    def _key(self, n: int) -> str:
        return f"ledger/{self.name}/{n:08d}.json"

    def _where(self, n: int) -> str:
        return f"ledger {self.name}: entry {n} ({self._key(n)})"

    def _last(self) -> int:
        prefix = f"ledger/{self.name}/"
        names = (key.removeprefix(prefix) for key in self._store.list(prefix))
        last = max((int(name[:8]) for name in names if _ENTRY.fullmatch(name)), default=-1)
        while self._store.exists(self._key(last + 1)):  # some object stores' listings lag behind their objects
            last += 1
        return last

    def _read(self, n: int) -> Entry:
        try:
            return self._parse(n, self._bytes(n))
        except IntegrityError:
            return self._parse(n, self._bytes(n))  # an answer that was cut on its way is whole the second time; damage is not

    def _bytes(self, n: int) -> bytes:
        try:
            return self._store.get(self._key(n))
        except StoreKeyError:
            raise IntegrityError(f"{self._where(n)} is missing; restore it from a backup of {self._store.url}") from None

    def _tried(self, n: int) -> Entry | IntegrityError:
        try:
            return self._read(n)
        except IntegrityError as error:
            return error

    def _parse(self, n: int, data: bytes) -> Entry:
        try:
            document = json.loads(data)
            whole = isinstance(document, dict) and canonical_json(document) == data
        except ValueError:
            whole = False
        if not whole:
            raise IntegrityError(f"{self._where(n)} is damaged: not the canonical JSON that was written; restore it from a backup")
        for name, kind in _FIELDS.items():
            if name not in document or not isinstance(document[name], kind):
                raise IntegrityError(f"{self._where(n)} is damaged: {name} is {document.get(name)!r}; restore it from a backup")
        if document["n"] != n or (document["previous"] is None) != (n == 0):
            raise IntegrityError(f"{self._where(n)} is not at its place: it says n {document['n']}, previous {document['previous']}")
        return Entry(
            n=n,
            sha256=hashlib.sha256(data).hexdigest(),
            previous=document["previous"],
            at=document["at"],
            kind=document["kind"],
            by=document["by"],
            reason=document["reason"],
            body={name: value for name, value in document.items() if name not in _FIELDS},
        )

    def _follows(self, entry: Entry, before: Entry) -> None:
        if entry.previous != before.sha256:
            raise IntegrityError(
                f"{self._where(before.n)} was changed: its sha256 is {before.sha256}, entry {entry.n} recorded {entry.previous}; "
                "restore both from a backup"
            )


@dataclass(frozen=True)
class Standing:
    """What a prompt's ledger says now."""

    champion: dict[str, Any] | None
    """{release, version, output, ...} of the release in production; None for an empty ledger."""
    previous: dict[str, Any] | None
    """The champion before, another release; barred, if a rollback left it."""
    fallback: dict[str, Any] | None
    """What a rollback goes to: the latest former champion that is another release and not barred."""
    barred: frozenset[str]
    """Releases that a rollback left and nobody unbarred."""
    since: str | None
    """`at` of the entry that made it the champion."""


def standing(entries: Iterable[Entry]) -> Standing:
    """Follows a prompt's ledger from its first entry. An entry that carries a champion sets it; a rollback bars the one it leaves."""
    reigns: list[dict[str, Any]] = []  # no release twice in a row
    barred: set[str] = set()
    since: str | None = None
    for entry in entries:
        champion = entry.body.get("champion")
        if champion is not None:
            if reigns and reigns[-1]["release"] == champion["release"]:
                reigns[-1] = champion
            else:
                if entry.kind == "rollback" and reigns:
                    barred.add(reigns[-1]["release"])
                reigns.append(champion)
                since = entry.at
        if entry.kind == "unbar":
            barred.discard(entry.body.get("release", ""))
    current = reigns[-1] if reigns else None
    former = reversed(reigns[:-1])
    return Standing(
        champion=current,
        previous=reigns[-2] if len(reigns) > 1 else None,
        fallback=next((one for one in former if current and one["release"] not in {current["release"], *barred}), None),
        barred=frozenset(barred),
        since=since,
    )


def decided(entries: Iterable[Entry], fingerprint: str) -> Entry | None:
    """The latest promotion, hold or rejection of a run with this fingerprint."""
    found = (entry for entry in reversed(list(entries)) if entry.kind in _DECISIONS)
    return next((entry for entry in found if entry.body.get("fingerprint") == fingerprint), None)


def looks_before(entries: Iterable[Entry], look: Mapping[str, Any]) -> dict[str, float]:
    """Other comparisons on the test split of a decision's `look`, and the chance of luck that each has taken: the most it was given."""
    taken: dict[str, float] = {}
    for entry in entries:
        other = entry.body.get("look")
        if other and other["split"] == look["split"] and other["comparison"] != look["comparison"]:
            taken[other["comparison"]] = max(other["takes"], taken.get(other["comparison"], 0.0))
    return taken


def spent_before(entries: Iterable[Entry], look: Mapping[str, Any]) -> float:
    """Chance of luck that the ledger's other comparisons on the same test split have taken together."""
    return sum(looks_before(entries, look).values())
