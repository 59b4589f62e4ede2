"""One landed object becomes a part of kept rows and a part of quarantined ones, and every row of it is accounted for."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pandera.pandas as pa

from retune.config import Prompt
from retune.data.columns import arrow, joined, normalised, redacted
from retune.data.forgotten import Forgotten
from retune.data.landing import LandingObject, file_sha256
from retune.data.parts import BETWEEN_INPUTS, PartWriter, part_schema, quarantine_schema, split_buckets
from retune.data.read import CHUNK_ROWS, Chunk, Layout, open_reading
from retune.data.schema import Fields, build_schema, failures, tidy
from retune.errors import IntegrityError

__all__ = ["NO_SLICE", "QUARANTINE", "Changes", "ObjectResult", "fields_of", "ingest_object", "layout_of", "new_or_changed"]

QUARANTINE = "quarantine"
"""Folder of the quarantined rows, beside the parts."""
NO_SLICE = "(none)"
"""Value of a slice that may be anything, in a row that has none."""
_RECORD_CHARACTERS = 2_000
_REASON_CHARACTERS = 300
_FORGOTTEN_CHARACTERS = 100_000
"""Of each input of a row that may be a forgotten one, whatever the prompt allows now: a longer text takes too long to clean, and is kept
only by a prompt that allows it."""
_REDACTIONS = ("mail", "phone", "card")


@dataclass(frozen=True)
class ObjectResult:
    """What became of one landed object."""

    key: str
    sequence: int
    fingerprint: str
    sha256: str
    """Of the object's bytes."""
    rows: int
    kept: int
    duplicates: int
    quarantined: dict[str, int]
    """Kind -> rows; see `retune.data.schema.KINDS`."""
    redacted: dict[str, int]
    """mail, phone, card -> replacements, in kept, duplicate and quarantined rows."""
    part: str | None
    """File name of the kept rows; None where there are none."""
    quarantine: str | None
    """File name of the quarantined rows, in the folder `quarantine`; None where there are none."""
    assumptions: list[str]
    """How the file was read, in sentences for the user."""
    forgotten: int = 0
    """Rows that `retune forget` removed once: they stay out, and leave nothing but this count."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Changes:
    read: tuple[LandingObject, ...]
    """New objects, and known ones whose bytes changed."""
    unchanged: tuple[str, ...]
    """Keys of objects with the bytes that are known."""
    fingerprints: dict[str, str]
    """Key -> new fingerprint, where only that changed."""
    vanished: tuple[str, ...]
    """Known keys that are not there any more; their rows stay."""


@dataclass
class _Tally:
    rows: int = 0
    kept: int = 0
    duplicates: int = 0
    forgotten: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    respelled: dict[str, dict[str, str]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)
    """Digests of the rows kept so far: 16 bytes a row, the only thing that grows with the object."""


def fields_of(prompt: Prompt) -> Fields:
    return Fields(
        inputs=prompt.inputs,
        target=prompt.target,
        labels=tuple(prompt.labels),
        slices=prompt.slices,
        min_characters=prompt.preprocess.min_characters,
        max_characters=prompt.source.max_characters,
    )


def layout_of(prompt: Prompt) -> Layout:
    source = prompt.source
    return Layout(
        columns={name: source.columns.get(name, name) for name in fields_of(prompt).names},
        target=prompt.target,
        labels=tuple(prompt.labels),
        header=source.header,
        delimiter=source.delimiter,
        quote=source.quote,
        encoding=source.encoding,
        max_record=source.max_record_characters,
        max_columns=source.max_columns,
        max_expansion=source.max_expansion,
    )


def new_or_changed(objects: Iterable[LandingObject], known: Mapping[str, Mapping[str, Any]]) -> Changes:
    """What to read. `known`: key -> at least `fingerprint` and `sha256` of the object as it was read last.

    A known fingerprint is believed; where it differs, the bytes decide. Raises StageError when an object is replaced meanwhile.
    """
    read: list[LandingObject] = []
    unchanged: list[str] = []
    fingerprints: dict[str, str] = {}
    present = set()
    for item in objects:
        present.add(item.key)
        before = known.get(item.key)
        if before is None:
            read.append(item)
            continue
        if before["fingerprint"] != item.fingerprint:
            with item.snapshot() as path:
                sha256 = file_sha256(path)
            if sha256 != before["sha256"]:
                read.append(item)
                continue
            fingerprints[item.key] = item.fingerprint
        unchanged.append(item.key)
    return Changes(tuple(read), tuple(unchanged), fingerprints, tuple(sorted(set(known) - present)))


def ingest_object(
    prompt: Prompt,
    item: LandingObject,
    sequence: int,
    out_dir: Path,
    chunk_rows: int = CHUNK_ROWS,
    forgotten: Sequence[Forgotten] = (),
) -> ObjectResult:
    """Leaves out forgotten rows, parses, validates, quarantines, redacts and drops exact duplicates, chunk by chunk.

    Reads: the object. Writes: `out_dir/<sha256[:16]>.parquet` and `out_dir/quarantine/<sha256[:16]>.parquet`, each only if it has rows;
    the same object and sequence give the same bytes. Raises BadInputError for a missing column or a file that is not what its suffix
    says, StageError when the object is replaced meanwhile (a retry helps); nothing is written then.
    """
    fields = fields_of(prompt)
    schema = build_schema(fields)
    tally = _Tally()
    most = max(fields.max_characters, _FORGOTTEN_CHARACTERS)
    for rows in forgotten:
        rows.check(fields.names)
    with PartWriter(out_dir, part_schema(fields.names)) as kept, PartWriter(out_dir / QUARANTINE, quarantine_schema()) as quarantined:
        with item.snapshot() as path:
            sha256 = file_sha256(path)
            reading = open_reading(path, item.key, layout_of(prompt), chunk_rows)
            for chunk in reading.chunks:
                good, bad = _take(_without(chunk, forgotten, tally, most), fields, schema, tally)
                kept.write(good.assign(object=sequence))
                quarantined.write(bad.assign(object=sequence))
        if tally.rows != tally.kept + tally.duplicates + tally.quarantined.total() + tally.forgotten:
            raise IntegrityError(
                f"{item.key}: {tally.rows} rows must be kept + duplicates + quarantined + forgotten, got "
                f"{tally.kept} + {tally.duplicates} + {tally.quarantined.total()} + {tally.forgotten}"
            )
        quarantine = quarantined.commit()
        part = kept.commit()
    return ObjectResult(
        key=item.key,
        sequence=sequence,
        fingerprint=item.fingerprint,
        sha256=sha256,
        rows=tally.rows,
        kept=tally.kept,
        duplicates=tally.duplicates,
        quarantined=dict(sorted(tally.quarantined.items())),
        redacted={kind: tally.redacted[kind] for kind in _REDACTIONS},
        part=part,
        quarantine=quarantine,
        assumptions=reading.assumptions + _spelling(tally.respelled),
        forgotten=tally.forgotten,
    )


def _without(chunk: Chunk, forgotten: Sequence[Forgotten], tally: _Tally, most: int) -> Chunk:
    """The chunk without rows that were forgotten, which count here and nowhere else."""
    for rows in forgotten:
        whole = rows.among(_of_length(chunk.frame, rows.inputs, most)).reindex(chunk.frame.index, fill_value=False)
        gone = whole | rows.among(chunk.frame.map(_recorded, na_action="ignore"))
        malformed = tuple(item for item in chunk.malformed if not rows.holds([_recorded(item.raw)]))
        count = int(gone.sum()) + len(chunk.malformed) - len(malformed)
        tally.rows += count
        tally.forgotten += count
        chunk = Chunk(chunk.frame[~gone], malformed)
    return chunk


def _of_length(frame: pd.DataFrame, inputs: Sequence[str], most: int) -> pd.DataFrame:
    """The rows whose inputs have at most so many characters each."""
    return frame[np.logical_and.reduce([frame[name].str.len().fillna(0).to_numpy() <= most for name in inputs])]


def _recorded(text: str) -> str:
    """What the quarantine keeps of a text."""
    return _start(text, _RECORD_CHARACTERS)


def _take(chunk: Chunk, fields: Fields, schema: pa.DataFrameSchema, tally: _Tally) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of a chunk to keep, and those to quarantine."""
    tidied = tidy(chunk.frame, fields)
    failed = failures(tidied.frame, schema, fields)
    for name, pairs in tidied.respelled.items():
        tally.respelled.setdefault(name, {}).update(pairs)
    tally.rows += len(chunk.frame) + len(chunk.malformed)
    good = ~chunk.frame.index.isin(failed.index)
    return _keep(chunk.frame[good], tidied.frame[good], fields, tally), _quarantine(chunk, failed, tally)


def _keep(raw: pd.DataFrame, tidied: pd.DataFrame, fields: Fields, tally: _Tally) -> pd.DataFrame:
    columns = {name: (raw if fields.is_free(name) else tidied)[name].fillna(NO_SLICE).array for name in fields.names}
    buckets = split_buckets(joined([arrow(raw[name]) for name in fields.inputs], BETWEEN_INPUTS))
    frame = pd.DataFrame({"row": raw.index, "bucket": buckets, **columns})
    redact_rows(frame, fields, tally)
    return frame[first_of_each(frame, fields, tally)]


def redact_rows(frame: pd.DataFrame, fields: Fields, tally: _Tally) -> None:
    """Takes personal data out of all fields but those whose values the prompt declares."""
    for name in fields.names:
        if fields.is_free(name) or not fields.allowed(name):
            frame[name], counts = redacted(frame[name])
            tally.redacted.update(counts)


def first_of_each(frame: pd.DataFrame, fields: Fields, tally: _Tally) -> npt.NDArray[np.bool_]:
    """Whether each row is the first of the object with its cells, but for spelling that `normalise` evens out."""
    first = np.empty(len(frame), dtype=bool)
    # No normalised text holds white space other than single spaces: the separator is in none.
    for place, cells in enumerate(joined([normalised(arrow(frame[name])) for name in fields.names], "\n")):
        digest = hashlib.blake2b(cells, digest_size=16).digest()
        first[place] = digest not in tally.seen
        tally.seen.add(digest)
    tally.kept += int(first.sum())
    tally.duplicates += int((~first).sum())
    return first


def _quarantine(chunk: Chunk, failed: pd.DataFrame, tally: _Tally) -> pd.DataFrame:
    malformed = chunk.malformed
    landed = chunk.frame.loc[failed.index]
    cells = {str(name): _shown(arrow(landed[name]).to_pylist(), tally) for name in landed}
    records: list[dict[str, str | None]] = [{"raw": raw} for raw in _shown([item.raw for item in malformed], tally)]
    records += [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    kinds = ["malformed"] * len(malformed) + failed["kind"].tolist()
    reasons = [_start(reason, _REASON_CHARACTERS) for reason in [*(item.reason for item in malformed), *failed["reason"]]]
    tally.quarantined.update(kinds)
    quarantined = {
        "row": [*(item.row for item in malformed), *failed.index],
        "kind": kinds,
        "reason": redacted(pd.Series(reasons, dtype="str"))[0],
        "record": [json.dumps(record, ensure_ascii=False) for record in records],
    }
    return pd.DataFrame(quarantined).sort_values("row", ignore_index=True)


def _shown(texts: Iterable[str | None], tally: _Tally) -> list[str | None]:
    """What the quarantine shows of texts; a missing one is None."""
    shown, counts = redacted(pd.Series([None if text is None else _recorded(text) for text in texts], dtype="str"))
    tally.redacted.update(counts)
    return list(arrow(shown).to_pylist())


def _start(text: str, characters: int) -> str:
    """The text's start, cut where no mail address or number is cut in two (half of one would not be recognised)."""
    if len(text) <= characters:
        return text
    head = text[:characters]
    if not text[characters].isspace():
        head = head.rpartition(" ")[0]
    return re.sub(r"[\d\s().+/-]+\Z", "", head) + " …"


def _spelling(respelled: Mapping[str, Mapping[str, str]]) -> list[str]:
    sentences = []
    for name, pairs in sorted(respelled.items()):
        examples: Sequence[str] = [f"{landed!r} as {declared!r}" for landed, declared in sorted(pairs.items())[:5]]
        sentences.append(f"{name} is matched without regard to case: {', '.join(examples)}")
    return sentences
