"""Landed files as chunks of rows, in bounded memory. Malformed records come beside the rows, never instead of an answer."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retune.data.bulk import Batch, can_parse, read_batches
from retune.data.dialect import Assembler, Dialect, Record, sniff, too_long
from retune.data.encoding import (
    FREE_BYTES,
    MAX_EXPANSION,
    MAX_RECORD,
    CutLine,
    expands,
    find_encoding,
    first_lines,
    open_bytes,
    read_lines,
)
from retune.data.landing import format_of
from retune.data.parquet_pages import read_footer, read_pages
from retune.errors import BadInputError
from retune.text import clean

__all__ = ["CHUNK_ROWS", "Chunk", "Layout", "Malformed", "Reading", "open_reading"]

CHUNK_ROWS = 50_000
_CHUNK_CHARACTERS = 8_000_000
_SEEN_BY = 20_000
"""Row of a JSON lines file by which each column must have stood in some row."""
_MAX_COLUMNS = 1_000
_SHOWN_COLUMNS = 50
_SHARING_ROWS = 32
"""Rows read at once of a Parquet column whose texts are told by what they share: each may be as long as a whole page."""
_SHARING_PAGE = 8 << 20

Ints = npt.NDArray[np.int64]
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Layout:
    """Which columns to read, and what the prompt file says of the files."""

    columns: Mapping[str, str | int]
    """Prompt field -> column name or position."""
    target: str
    labels: tuple[str, ...]
    header: bool | None = None
    delimiter: str | None = None
    quote: str | None = None
    encoding: str | None = None
    max_record: int = MAX_RECORD
    """Characters of a line or record."""
    max_columns: int = _MAX_COLUMNS
    max_expansion: float = MAX_EXPANSION
    """What a compressed file may hold, in times its size."""


@dataclass(frozen=True)
class Malformed:
    row: int
    reason: str
    raw: str
    """The record as it stands in the file, or its start."""


@dataclass(frozen=True)
class Chunk:
    frame: pd.DataFrame
    """Index: row number from 1; one `str` column per prompt field, missing values as NaN."""
    malformed: tuple[Malformed, ...]


@dataclass(frozen=True)
class Reading:
    chunks: Iterator[Chunk]
    assumptions: list[str]
    """Sentences for the user; complete once the chunks are read."""


Row = tuple[int, "list[str | None] | Malformed"]


def open_reading(path: Path, key: str, layout: Layout, chunk_rows: int = CHUNK_ROWS) -> Reading:
    """Opens the file that was landed as `key`; its suffix says the format.

    Memory is bounded by characters, not by rows, whatever the file holds.

    Raises BadInputError, here or while chunks are read, for a column that is missing, for a file that is no such format at all, and for
    one that holds more than it may.
    """
    name = format_of(key)
    if name is None:
        raise BadInputError(f"{key}: unknown suffix")
    assumptions: list[str] = []
    suffix, _, gz = name.partition(".")
    if suffix in ("parquet", "jsonl"):
        rows = _read_parquet(path, layout, chunk_rows) if suffix == "parquet" else _read_json(path, bool(gz), layout, assumptions)
        chunks = _chunks(rows, list(layout.columns), chunk_rows)
    else:
        chunks = _read_delimited(path, suffix, bool(gz), layout, assumptions, chunk_rows)
    return Reading(_naming(key, chunks), assumptions)


def _naming(key: str, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    try:
        yield from chunks
    except BadInputError as error:
        raise BadInputError(f"{key}: {error}") from None


def _chunks(rows: Iterator[Row], fields: list[str], chunk_rows: int) -> Iterator[Chunk]:
    numbers: list[int] = []
    values: list[list[str | None]] = []
    malformed: list[Malformed] = []
    characters = 0
    for number, row in rows:
        if isinstance(row, Malformed):
            malformed.append(row)
            characters += len(row.raw)
        else:
            numbers.append(number)
            values.append(row)
            characters += sum(map(len, filter(None, row)))
        if len(numbers) + len(malformed) >= chunk_rows or characters >= _CHUNK_CHARACTERS:
            yield _chunk(numbers, values, malformed, fields)
            numbers, values, malformed, characters = [], [], [], 0
    if numbers or malformed:
        yield _chunk(numbers, values, malformed, fields)


def _chunk(numbers: list[int], values: list[list[str | None]], malformed: list[Malformed], fields: list[str]) -> Chunk:
    columns = zip(*values, strict=True) if values else repeat((), len(fields))
    texts = {name: pa.array(column, pa.large_string()).to_pandas().array for name, column in zip(fields, columns, strict=True)}
    return Chunk(pd.DataFrame(texts, index=pd.Index(numbers, name="row", dtype="int64"), dtype="str"), tuple(malformed))


@dataclass(frozen=True)
class _Piece:
    """Records with numbers in a row."""

    first: int
    numbers: Ints
    """Of the good ones, in order."""
    columns: list[pa.Array]
    malformed: list[Malformed]
    sizes: Ints
    """Characters of each record, good or malformed."""

    def part(self, start: int, stop: int) -> "_Piece":
        first, end = self.first + start, self.first + stop
        low, high = np.searchsorted(self.numbers, [first, end]).tolist()
        columns = [column.slice(low, high - low) for column in self.columns]
        malformed = [item for item in self.malformed if first <= item.row < end]
        return _Piece(first, self.numbers[low:high], columns, malformed, self.sizes[start:stop])


def _piece(batch: Batch, row_of: Callable[[int, Record], "list[str | None] | Malformed"]) -> _Piece:
    rows = [(number, row_of(number, record)) for number, record in batch.others]
    malformed = [row for _, row in rows if isinstance(row, Malformed)]
    good = [(number, row) for number, row in rows if not isinstance(row, Malformed)]
    numbers = np.concatenate([batch.numbers, np.array([number for number, _ in good], dtype=np.int64)])
    order = np.argsort(numbers, kind="stable")
    columns = [
        pa.concat_arrays([column, pa.array([row[place] for _, row in good], pa.large_string())]).take(pa.array(order))
        for place, column in enumerate(batch.columns)
    ]
    numbers = numbers[order]
    first = min([*numbers[:1].tolist(), *(item.row for item in malformed[:1])], default=1)
    sizes = np.zeros(len(numbers) + len(malformed), dtype=np.int64)
    sizes[numbers - first] = sum(np.asarray(pc.utf8_length(column)) for column in columns)
    for item in malformed:
        sizes[item.row - first] = len(item.raw)
    return _Piece(first, numbers, columns, malformed, sizes)


def _cut(pieces: Iterable[_Piece], fields: list[str], chunk_rows: int) -> Iterator[Chunk]:
    """Chunks of as many rows or characters as those of `_chunks`."""
    held: list[_Piece] = []
    records = characters = 0
    for piece in pieces:
        start = 0
        while start < len(piece.sizes):
            total = characters + np.cumsum(piece.sizes[start:])
            stop = start + min(chunk_rows - records, int(np.searchsorted(total, _CHUNK_CHARACTERS)) + 1)
            if stop > len(piece.sizes):
                held.append(piece.part(start, len(piece.sizes)))
                records, characters = records + len(total), int(total[-1])
                break
            yield _of_pieces([*held, piece.part(start, stop)], fields)
            held, records, characters, start = [], 0, 0, stop
    if held:
        yield _of_pieces(held, fields)


def _of_pieces(pieces: list[_Piece], fields: list[str]) -> Chunk:
    texts = {name: pa.concat_arrays([piece.columns[place] for piece in pieces]).to_pandas().array for place, name in enumerate(fields)}
    index = pd.Index(np.concatenate([piece.numbers for piece in pieces]), name="row")
    return Chunk(pd.DataFrame(texts, index=index, dtype="str"), tuple(item for piece in pieces for item in piece.malformed))


def _read_delimited(path: Path, suffix: str, compressed: bool, layout: Layout, assumptions: list[str], chunk_rows: int) -> Iterator[Chunk]:
    encoding = find_encoding(path, compressed, layout.encoding, layout.max_expansion)
    if encoding.assumption:
        assumptions.append(encoding.assumption)
    with open_bytes(path, compressed, layout.max_expansion) as stream:
        lines = read_lines(stream, encoding.name, layout.max_record)
        sample = first_lines(lines)
        dialect, assumed = sniff(
            sample,
            suffix=suffix,
            columns=layout.columns,
            target=layout.target,
            labels=layout.labels,
            delimiter=layout.delimiter,
            quote=layout.quote,
            header=layout.header,
        )
        if not dialect.width:
            if any(isinstance(line, CutLine) for line in sample):
                raise BadInputError(f"its columns cannot be told: {too_long(layout.max_record)}")
            return
        _check_width(dialect.width, layout)
        assumptions += assumed
        records = Assembler(chain(sample, lines), dialect.delimiter, dialect.quote, dialect.width, layout.max_record)
        if dialect.names is not None:
            next(records)
            places, renamed = _named_places(layout.columns, dialect.names)
            assumptions += renamed
        else:
            places = _positions(layout.columns, dialect, sample[0])

        def row_of(number: int, record: Record) -> list[str | None] | Malformed:
            problem = record.problem
            if problem is None and encoding.lossy and "\ufffd" in record.raw:
                problem = f"bytes that are not valid {encoding.name}"
            return Malformed(number, problem, record.raw) if problem is not None else [record.fields[place] for place in places]

        if can_parse(dialect):
            pieces = (_piece(batch, row_of) for batch in read_batches(records, dialect, places))
            yield from _cut(pieces, list(layout.columns), chunk_rows)
        else:
            rows = ((number, row_of(number, record)) for number, record in enumerate(records, 1))
            yield from _chunks(rows, list(layout.columns), chunk_rows)


def _check_width(width: int, layout: Layout) -> None:
    if width > layout.max_columns:
        raise BadInputError(
            f"has {width:,} columns, at most {layout.max_columns:,} are read; raise source.max_columns in the prompt file if that is right"
        )


def _named_places(columns: Mapping[str, str | int], names: tuple[str, ...]) -> tuple[list[int], list[str]]:
    places: list[int] = []
    assumed: list[str] = []
    missing: list[tuple[str, str | int]] = []
    lowered = [name.casefold() for name in names]
    for field, column in columns.items():
        if isinstance(column, int):
            if column >= len(names):
                missing.append((field, column))
            places.append(column)
        elif names.count(column) == 1:
            places.append(names.index(column))
        elif not names.count(column) and lowered.count(column.casefold()) == 1:
            place = lowered.index(column.casefold())
            assumed.append(f"column {names[place]!r} is read as {column!r}")
            places.append(place)
        else:
            missing.append((field, column))
    if missing:
        raise _missing_column(missing, names)
    return places, assumed


def _missing_column(missing: Iterable[tuple[str, str | int]], names: Sequence[str]) -> BadInputError:
    wanted = ", ".join(f"{column!r} (for {field})" for field, column in missing)
    example = ", ".join(f"{field}: COLUMN" for field, _ in missing)
    found = ", ".join(_shown(name) for name in names[:_SHOWN_COLUMNS]) + (", ..." if len(names) > _SHOWN_COLUMNS else "")
    return BadInputError(
        f"column {wanted} must be there once; columns found: {found}. Map it in the prompt file: source.columns: {{{example}}}"
    )


def _positions(columns: Mapping[str, str | int], dialect: Dialect, first: str) -> list[int]:
    places = [column for column in columns.values() if isinstance(column, int)]
    if len(places) < len(columns) or max(places) >= dialect.width:
        example = ", ".join(f"{field}: {place}" for place, field in enumerate(columns))
        raise BadInputError(
            f"no header found, and source.columns does not give every field a position below {dialect.width}; the first line is "
            f"{_shown(first)}. Map fields by position: source.columns: {{{example}}}, or say source.header: true"
        )
    return places


def _shown(text: str) -> str:
    return repr(clean(text[:200])[:60])


def _read_json(path: Path, compressed: bool, layout: Layout, assumptions: list[str]) -> Iterator[Row]:
    encoding = find_encoding(path, compressed, layout.encoding, layout.max_expansion)
    if encoding.assumption:
        assumptions.append(encoding.assumption)
    seen: set[str | int] = set()
    found: dict[str, None] = {}
    number = 0
    with open_bytes(path, compressed, layout.max_expansion) as stream:
        for line in read_lines(stream, encoding.name, layout.max_record):
            cut = isinstance(line, CutLine)
            if not cut and not line.strip():
                continue
            number += 1
            record, problem = ({}, too_long(layout.max_record)) if cut else _parse_json(line, lossy=encoding.lossy)
            values: list[str | None] = []
            if problem is None:
                for column in layout.columns.values():
                    value, there = _cell(record, column)
                    if there:
                        seen.add(column)
                    if isinstance(value, dict | list):
                        problem = f"{column} must be text, got {'an object' if isinstance(value, dict) else 'a list'}"
                    values.append(_json_text(value))
                if len(found) < 100 and isinstance(record, dict):
                    found.update(dict.fromkeys(name[:100] for name in islice(record, 100)))
            if problem is not None:
                yield number, Malformed(number, problem, str(line))
            else:
                yield number, values
            if number == _SEEN_BY:
                _check_seen(layout.columns, seen, found)
    if number < _SEEN_BY:
        _check_seen(layout.columns, seen, found)


def _check_seen(columns: Mapping[str, str | int], seen: set[str | int], found: Mapping[str, None]) -> None:
    missing = [(field, column) for field, column in columns.items() if column not in seen]
    if missing and found:
        raise _missing_column(missing, list(found))


def _parse_json(text: str, *, lossy: bool) -> tuple[dict[str, Any] | list[Any], str | None]:
    if lossy and "\ufffd" in text:
        return {}, "bytes that are not valid in the file's encoding"
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return {}, f"not valid JSON: {error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:
        return {}, f"not valid JSON: {type(error).__name__}"
    if not isinstance(record, dict | list):
        return {}, f"must be a JSON object, got {type(record).__name__}"
    return record, None


def _cell(record: dict[str, Any] | list[Any], column: str | int) -> tuple[Any, bool]:
    if isinstance(record, list):
        there = isinstance(column, int) and column < len(record)
        return (record[int(column)] if there else None), there
    return record.get(str(column)), str(column) in record


def _json_text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return _SURROGATE.sub("\ufffd", text)


def _read_parquet(path: Path, layout: Layout, chunk_rows: int) -> Iterator[Row]:
    size = path.stat().st_size
    most = FREE_BYTES + size * layout.max_expansion
    footer = read_footer(path)
    try:
        schema = pq.read_schema(path)
        _check_width(len(schema.names), layout)
        places, _ = _named_places(layout.columns, tuple(schema.names))
        wanted = [schema.names[place] for place in places]
        for name in wanted:
            _check_text(name, schema.field(name).type)
        pages = read_pages(path, footer, wanted, most)
        if pages.unpacked > most:
            raise expands(size, layout.max_expansion)
        if pages.shared_starts and pages.largest > _SHARING_PAGE:
            raise BadInputError(
                f"a page of {pages.largest:,} bytes whose texts are encoded by what they share (DELTA_BYTE_ARRAY) may hold any amount of "
                f"text, at most {_SHARING_PAGE:,} bytes are read; write it with smaller pages or in another encoding"
            )
        # A dictionary of long texts with many references to them must not be laid out as that many texts.
        with pq.ParquetFile(path, read_dictionary=[] if pages.shared_starts else wanted) as file:
            average = pages.unpacked // max(1, file.metadata.num_rows) + 1
            rows = min(_SHARING_ROWS if pages.shared_starts else chunk_rows, max(1, _CHUNK_CHARACTERS // average))
            number, read = 0, 0
            for batch in file.iter_batches(batch_size=rows, columns=list(dict.fromkeys(wanted))):
                for piece in _pieces(batch):
                    texts = {name: _texts(piece.column(name)) for name in piece.schema.names}
                    for values in zip(*(texts[name] for name in wanted), strict=True):
                        number += 1
                        characters = sum(len(value) for value in values if value is not None)
                        read += characters + 1
                        if read > most:
                            raise expands(size, layout.max_expansion)
                        if characters > layout.max_record:
                            raw = "\t".join((value or "")[: layout.max_record] for value in values)
                            yield number, Malformed(number, too_long(layout.max_record), raw[: layout.max_record])
                        else:
                            yield number, list(values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"not a readable Parquet file: {error}") from None


def _check_text(name: str, kind: pa.DataType) -> None:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise BadInputError(f"column {name!r} must hold text, got {kind}")


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch, cut so that the texts of a piece take few bytes, or it is one row."""
    ends = np.cumsum(sum(_lengths(column) for column in batch.columns))
    start = 0
    while start < batch.num_rows:
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _CHUNK_CHARACTERS, "right")))
        yield batch.slice(start, stop - start)
        start = stop


def _lengths(column: pa.Array) -> np.ndarray:
    """Bytes of each text; what is no text takes few."""
    if pa.types.is_dictionary(column.type):
        if len(column.dictionary):
            return _filled(_lengths(column.dictionary)[_filled(column.indices)] * np.asarray(column.is_valid()))
        return np.zeros(len(column), "int64")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _filled(pc.binary_length(column))
    return np.full(len(column), 32, "int64")


def _filled(numbers: Any) -> np.ndarray:
    array = pc.fill_null(numbers, 0) if isinstance(numbers, pa.Array) else numbers
    return np.asarray(array).astype("int64")


def _texts(column: pa.Array) -> list[str | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return list(pc.cast(column, pa.string()).to_pylist())
