"""What `retune forget` rewrote: how a lineage that was recorded before reads now, and how that is said.

A ledger is a chain of hashes and stays as it was written; it holds no row. An entry `forget` of the dataset ledger is the revision without
the rows, and carries for every object that held some which one took its place.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import yaml

from retune.data.forgotten import Forgotten
from retune.dvc_files import lock_text, sections
from retune.ledger import Entry, Ledger
from retune.records import Lineage
from retune.store import Store

__all__ = ["DATASET", "FORGET", "Rewritten"]

DATASET = "dataset"
FORGET = "forget"
"""Kind of the entry."""


@dataclass(frozen=True)
class Rewritten:
    """Every forget of a store, oldest first."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, store: Store) -> Self:
        return cls.among(Ledger(store, DATASET).entries())

    @classmethod
    def among(cls, entries: Iterable[Entry]) -> Self:
        return cls(tuple(entry for entry in entries if entry.kind == FORGET))

    @cached_property
    def replaced(self) -> Mapping[str, str | None]:
        """md5 of an object that held forgotten rows -> what stands in its place now; None: nothing."""
        direct: dict[str, str | None] = {}
        for entry in self.entries:
            direct |= entry.body["forget"]["replaced"]
        return {md5: _end(direct, md5) for md5 in direct}

    def forgotten(self, prompt: str) -> list[Forgotten]:
        """How the rows of a prompt are known again."""
        return [Forgotten.from_json(e.body["forget"]["rows"]) for e in self.entries if e.body["forget"]["prompt"] == prompt]

    def deleted(self) -> dict[str, int]:
        """Release -> dataset revision at which it was deleted, since it held forgotten rows or was to go with them."""
        return {release: entry.n for entry in self.entries for release in entry.body["forget"]["releases_deleted"]}

    def current(self, lineage: Lineage) -> Lineage:
        """The lineage with what stands in the place of rewritten objects. A section of which nothing is left leaves the lock."""
        if not any(md5 in lineage.data or md5 in lineage.lock for md5 in self.replaced):
            return lineage
        data = yaml.safe_load(lineage.data) or {}
        if "outs" in data:
            data["outs"] = [self.out(out) or out for out in data["outs"]]
        found = {name: self._section(section) for name, section in sections(lineage.lock).items()}
        lock = lock_text({name: section for name, section in found.items() if section}) if lineage.lock else ""
        return replace(lineage, data=yaml.safe_dump(data, sort_keys=False), lock=lock)

    def out(self, out: Mapping[str, Any]) -> dict[str, Any] | None:
        """An output as data.dvc or dvc.lock names it, under its present hash; None where nothing took its place."""
        md5 = self.replaced.get(out["md5"], out["md5"])
        if md5 == out["md5"]:
            return dict(out)
        # The size is DVC's hint to itself and would be wrong.
        return None if md5 is None else {**{key: value for key, value in out.items() if key not in ("size", "nfiles")}, "md5": md5}

    def _section(self, section: Mapping[str, Any]) -> dict[str, Any] | None:
        if "outs" not in section:
            return dict(section)
        outs = [out for each in section["outs"] if (out := self.out(each)) is not None]
        return {**section, "outs": outs} if outs else None

    def told(self, revision: int) -> list[str]:
        """A sentence for each forget that took rows out of a dataset revision."""
        sentences = []
        for entry in self.entries:
            taken = entry.body["forget"]["revisions"].get(str(revision))
            if taken:
                less = f"{taken['kept']} row{'' if taken['kept'] == 1 else 's'}"
                less += f" and {taken['quarantined']} quarantined" if taken["quarantined"] else ""
                prompt = entry.body["forget"]["prompt"]
                sentences.append(f"dataset revision {revision} was rewritten by forget at revision {entry.n}: {less} of {prompt} less")
        return sentences


def _end(direct: Mapping[str, str | None], md5: str) -> str | None:
    found: str | None = md5
    while found is not None and found in direct:
        found = direct[found]
    return found
