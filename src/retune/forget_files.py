"""The files in which rows stand, without some of them: bytes in, bytes out. None: the file holds none of the rows."""

import io
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from retune.data.forgotten import Forgotten
from retune.data.parts import PartWriter
from retune.errors import ConfigError
from retune.text import CARD, MAIL, PHONE, clean, redact

__all__ = ["Part", "Selection", "holds_examples", "kept_part", "mentions", "quarantine_part", "without_rows"]

_COPY = re.compile(r"[#~]")
"""Begins what augmentation and probes append to the id of the row they change."""


@dataclass(frozen=True)
class Selection:
    """What the caller of `retune forget` named."""

    match: Mapping[str, str]
    """Column -> value; a row must have all of them. Empty: none is asked for."""
    ids: frozenset[str]
    """`OBJECT:ROW`."""

    def __post_init__(self) -> None:
        for name, value in self.match.items():
            text, found = redact(value)
            if any(found.values()) or text.strip() in (MAIL, PHONE, CARD):
                raise ConfigError(
                    f"--match {name}: what is kept of a mail address, a phone or card number is {MAIL}, {PHONE} or {CARD}, the same for "
                    "everybody, so rows cannot be told by it. Name them by --id, or whole texts with a --rows-file"
                )

    def among(self, frame: pd.DataFrame) -> "pd.Series[bool]":
        """Rows of a part that are named, compared as they are kept: redacted, and without regard to white space."""
        found = _row_ids(frame).isin(self.ids)
        if self.match and set(self.match) <= set(frame.columns):
            wanted = [frame[name].map(_plain) == _plain(value) for name, value in self.match.items()]
            found |= pd.concat(wanted, axis=1).all(axis=1)
        return found

    def among_quarantined(self, frame: pd.DataFrame, records: Sequence[Mapping[str, str | None]]) -> "pd.Series[bool]":
        """Of a malformed record nobody knows the columns: it is named if the whole of it is the value, or by its id."""
        found = _row_ids(frame).isin(self.ids)
        if not self.match:
            return found
        wanted = {name: _plain(value) for name, value in self.match.items()}

        def named(record: Mapping[str, str | None]) -> bool:
            if set(record) == {"raw"}:
                return all(value == _plain(record["raw"] or "") for value in wanted.values())
            return all(_plain(record.get(name) or "") == value for name, value in wanted.items())

        return found | pd.Series([named(record) for record in records], index=frame.index, dtype=bool)


@dataclass(frozen=True)
class Part:
    """A part without the rows."""

    name: str | None
    """File name; None where no row is left."""
    content: bytes
    removed: pd.DataFrame
    """The rows that left."""

    @property
    def ids(self) -> list[str]:
        return list(_row_ids(self.removed))

    def fields(self, inputs: Sequence[str]) -> tuple[str, ...]:
        """Those of the input fields that the rows have: a part may be older than one. A quarantined record has each or is not known."""
        return tuple(name for name in inputs if "bucket" not in self.removed or name in self.removed)

    def texts(self, inputs: Sequence[str]) -> list[tuple[str, ...]]:
        """What the rows that left are known by: the texts of these fields, or the whole of a malformed record."""
        if "bucket" in self.removed:
            return list(zip(*(self.removed[name] for name in inputs), strict=True))
        records = [json.loads(record) for record in self.removed["record"]]
        known = [(r["raw"],) if set(r) == {"raw"} else tuple(r.get(name) for name in inputs) for r in records]
        return [texts for texts in known if all(isinstance(text, str) for text in texts)]


def kept_part(content: bytes, selection: Selection, forgotten: Sequence[Forgotten]) -> Part | None:
    """A part of kept rows."""
    return _part(content, lambda frame: _any(frame, [selection.among(frame), *(rows.among(frame) for rows in forgotten)]))


def quarantine_part(content: bytes, selection: Selection, forgotten: Sequence[Forgotten]) -> Part | None:
    """A part of quarantined rows."""

    def gone(frame: pd.DataFrame) -> "pd.Series[bool]":
        records = [json.loads(record) for record in frame["record"]]
        fields = pd.DataFrame(records, index=frame.index)
        raw = fields["raw"] if "raw" in fields else pd.Series(None, index=frame.index, dtype=object)
        known = [rows.among(fields) | raw.map(lambda text, rows=rows: isinstance(text, str) and rows.holds([text])) for rows in forgotten]
        return _any(frame, [selection.among_quarantined(frame, records), *known])

    return _part(content, gone)


def without_rows(content: bytes, ids: Collection[str], forgotten: Sequence[Forgotten]) -> bytes | None:
    """A split, or predictions or probes of one."""
    table = pq.read_table(io.BytesIO(content))
    frame = table.select([n for n in table.column_names if n in {"id", "of", *(f for rows in forgotten for f in rows.inputs)}]).to_pandas()
    masks = [*(_origins(frame[name]).isin(ids) for name in ("id", "of") if name in frame), *(rows.among(frame) for rows in forgotten)]
    gone = _any(frame, masks)
    if not gone.any():
        return None
    target = io.BytesIO()
    pq.write_table(table.filter((~gone).to_numpy()), target)
    return target.getvalue()


def mentions(report: bytes, ids: Collection[str]) -> bool:
    """Whether a report of stage preprocess quotes one of the rows, as a near-duplicate or what it is near to."""
    rows = json.loads(report)["near_duplicate_rows"]
    return any(row["id"] in ids or row["near_id"] in ids for row in rows)


def holds_examples(lines: bytes, ids: Collection[str], forgotten: Sequence[Forgotten]) -> bool:
    """Whether the examples of a few-shot release are some of the rows."""
    frame = pd.DataFrame([json.loads(line) for line in lines.decode().split("\n") if line])
    known = [rows.among(frame) for rows in forgotten]
    return bool(_any(frame, [frame["id"].isin(ids), *known] if "id" in frame else known).any())


def _part(content: bytes, gone: Callable[[pd.DataFrame], "pd.Series[bool]"]) -> Part | None:
    table = pq.read_table(io.BytesIO(content))
    frame = table.to_pandas()
    leaves = gone(frame)
    if not leaves.any():
        return None
    with tempfile.TemporaryDirectory(prefix="retune-forget-") as scratch, PartWriter(Path(scratch), table.schema) as writer:
        writer.write(frame[~leaves])
        name = writer.commit()
        left = (Path(scratch) / name).read_bytes() if name else b""
    return Part(name, left, frame[leaves])


def _row_ids(frame: pd.DataFrame) -> "pd.Series[str]":
    return frame["object"].astype(str) + ":" + frame["row"].astype(str)


def _origins(ids: "pd.Series[str]") -> "pd.Series[str]":
    """Id of the row that each was made from."""
    return ids.astype(object).map(lambda row: _COPY.split(row, maxsplit=1)[0] if isinstance(row, str) else "")


def _plain(text: str) -> str:
    return clean(text) if isinstance(text, str) else ""


def _any(frame: pd.DataFrame, masks: "Iterable[pd.Series[bool]]") -> "pd.Series[bool]":
    found = pd.Series(False, index=frame.index, dtype=bool)
    for mask in masks:
        found |= mask
    return found
