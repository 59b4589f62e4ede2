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

    def replaced_in(self, prompt: str) -> Mapping[str, str | None]:
        """The same for what the stages of one prompt made: another prompt may have made the same object, and keeps it."""
        return type(self)(tuple(e for e in self.entries if e.body["forget"]["prompt"] == prompt)).replaced

    def forgotten(self, prompt: str) -> list[Forgotten]:
        """How the rows of a prompt are known again."""
        bodies = [entry.body["forget"] for entry in self.entries if entry.body["forget"]["prompt"] == prompt]
        return [Forgotten.from_json(rows) for body in bodies for rows in [body["rows"], *body.get("rows_of_older_parts", [])]]

    def deleted(self) -> dict[str, int]:
        """Release -> dataset revision at which it was deleted, since it held forgotten rows or was to go with them."""
        return {release: entry.n for entry in self.entries for release in entry.body["forget"]["releases_deleted"]}

    def current(self, lineage: Lineage) -> Lineage:
        """The lineage with what stands in the place of rewritten objects. A section of which nothing is left leaves the lock."""
        if not any(md5 in lineage.data or md5 in lineage.lock for md5 in self.replaced):
            return lineage
        data = yaml.safe_load(lineage.data) or {}
        if "outs" in data:
            data["outs"] = [_out(self.replaced, out) or out for out in data["outs"]]
        found = {name: self._section(section, name.rpartition("@")[2]) for name, section in sections(lineage.lock).items()}
        lock = lock_text({name: section for name, section in found.items() if section}) if lineage.lock else ""
        return replace(lineage, data=yaml.safe_dump(data, sort_keys=False), lock=lock)

    def outs(self, outs: Iterable[Mapping[str, Any]], prompt: str) -> list[dict[str, Any]]:
        """Outputs of a prompt's stages under their present hash, without those in whose place nothing stands."""
        replaced = self.replaced_in(prompt)
        return [now for out in outs if (now := _out(replaced, out)) is not None]

    def _section(self, section: Mapping[str, Any], prompt: str) -> dict[str, Any] | None:
        if "outs" not in section:
            return dict(section)
        outs = self.outs(section["outs"], prompt)
        return {**section, "outs": outs} if outs else None

    def told(self, revision: int, prompt: str | None = None) -> list[str]:
        """A sentence for each forget that took rows out of a dataset revision; with a prompt, kept rows of it alone: releases follow from
        these."""
        sentences = []
        for entry in self.entries:
            name, taken = entry.body["forget"]["prompt"], entry.body["forget"]["revisions"].get(str(revision))
            if taken and (prompt is None or (prompt == name and taken["kept"])):
                less = f"{taken['kept']} row{'' if taken['kept'] == 1 else 's'}"
                less += f" and {taken['quarantined']} quarantined" if taken["quarantined"] else ""
                sentences.append(f"dataset revision {revision} was rewritten by forget at revision {entry.n}: {less} of {name} less")
        return sentences


def _out(replaced: Mapping[str, str | None], out: Mapping[str, Any]) -> dict[str, Any] | None:
    """An output as data.dvc or dvc.lock names it, under its present hash; None where nothing took its place."""
    md5 = replaced.get(out["md5"], out["md5"])
    if md5 == out["md5"]:
        return dict(out)
    # The size is DVC's hint to itself and would be wrong.
    return None if md5 is None else {**{key: value for key, value in out.items() if key not in ("size", "nfiles")}, "md5": md5}


def _end(direct: Mapping[str, str | None], md5: str) -> str | None:
    found: str | None = md5
    while found is not None and found in direct:
        found = direct[found]
    return found
