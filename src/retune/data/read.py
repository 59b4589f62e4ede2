"""Landed files as chunks of rows, in bounded memory. Malformed records come beside the rows, never instead of an answer."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retune.data.dialect import Dialect, assemble, sniff
from retune.data.encoding import MAX_LINE, find_encoding, open_bytes, read_lines
from retune.data.landing import format_of
from retune.errors import BadInputError
from retune.text import clean

__all__ = ["CHUNK_ROWS", "Chunk", "Layout", "Malformed", "Reading", "open_reading"]

CHUNK_ROWS = 20_000
_CHUNK_CHARACTERS = 8_000_000
_SAMPLE_LINES = 200
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

    Raises BadInputError, here or while chunks are read, for a column that is missing and for a file that is no such format at all.
    """
    name = format_of(key)
    if name is None:
        raise BadInputError(f"{key}: unknown suffix")
    assumptions: list[str] = []
    if name == "parquet":
        return Reading(_read_parquet(path, key, layout, chunk_rows), assumptions)
    suffix, _, gz = name.partition(".")
    if suffix == "jsonl":
        rows = _read_json(path, key, bool(gz), layout, assumptions)
    else:
        rows = _read_delimited(path, key, suffix, bool(gz), layout, assumptions)
    return Reading(_chunks(rows, list(layout.columns), chunk_rows), assumptions)


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
            characters += sum(len(value) for value in row if value is not None)
        if len(numbers) + len(malformed) >= chunk_rows or characters >= _CHUNK_CHARACTERS:
            yield _chunk(numbers, values, malformed, fields)
            numbers, values, malformed, characters = [], [], [], 0
    if numbers or malformed:
        yield _chunk(numbers, values, malformed, fields)


def _chunk(numbers: list[int], values: list[list[str | None]], malformed: list[Malformed], fields: list[str]) -> Chunk:
    frame = pd.DataFrame(values, columns=pd.Index(fields), index=pd.Index(numbers, name="row", dtype="int64"), dtype="str")
    return Chunk(frame, tuple(malformed))


def _read_delimited(path: Path, key: str, suffix: str, compressed: bool, layout: Layout, assumptions: list[str]) -> Iterator[Row]:
    encoding = find_encoding(path, compressed, layout.encoding)
    if encoding.assumption:
        assumptions.append(encoding.assumption)
    with open_bytes(path, compressed) as stream:
        lines = read_lines(stream, encoding.name)
        sample = list(islice(lines, _SAMPLE_LINES))
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
            return
        assumptions += assumed
        records = assemble(chain(sample, lines), dialect.delimiter, dialect.quote, dialect.width)
        if dialect.names is not None:
            next(records)
            places, renamed = _named_places(key, layout.columns, dialect.names)
            assumptions += renamed
        else:
            places = _positions(key, layout.columns, dialect, sample[0].text)
        for number, record in enumerate(records, 1):
            problem = record.problem
            if problem is None and encoding.lossy and "\ufffd" in record.raw:
                problem = f"bytes that are not valid {encoding.name}"
            if problem is not None:
                yield number, Malformed(number, problem, record.raw)
            else:
                yield number, [record.fields[place] for place in places]


def _named_places(key: str, columns: Mapping[str, str | int], names: tuple[str, ...]) -> tuple[list[int], list[str]]:
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
        raise _missing_column(key, missing, names)
    return places, assumed


def _missing_column(key: str, missing: Iterable[tuple[str, str | int]], names: Iterable[str]) -> BadInputError:
    wanted = ", ".join(f"{column!r} (for {field})" for field, column in missing)
    example = ", ".join(f"{field}: COLUMN" for field, _ in missing)
    found = ", ".join(_shown(name) for name in names)
    return BadInputError(
        f"{key}: column {wanted} must be there once; columns found: {found}. Map it in the prompt file: source.columns: {{{example}}}"
    )


def _positions(key: str, columns: Mapping[str, str | int], dialect: Dialect, first: str) -> list[int]:
    places = [column for column in columns.values() if isinstance(column, int)]
    if len(places) < len(columns) or max(places) >= dialect.width:
        example = ", ".join(f"{field}: {place}" for place, field in enumerate(columns))
        raise BadInputError(
            f"{key}: no header found, and source.columns does not give every field a position below {dialect.width}; the first line is "
            f"{_shown(first)}. Map fields by position: source.columns: {{{example}}}, or say source.header: true"
        )
    return places


def _shown(text: str) -> str:
    return repr(clean(text[:200])[:60])


def _read_json(path: Path, key: str, compressed: bool, layout: Layout, assumptions: list[str]) -> Iterator[Row]:
    encoding = find_encoding(path, compressed, layout.encoding)
    if encoding.assumption:
        assumptions.append(encoding.assumption)
    seen: set[str | int] = set()
    found: dict[str, None] = {}
    number = 0
    with open_bytes(path, compressed) as stream:
        for line in read_lines(stream, encoding.name):
            if not line.text.strip():
                continue
            number += 1
            record, problem = _parse_json(line.text, lossy=encoding.lossy)
            if line.cut:
                problem = f"line longer than {MAX_LINE:,} characters"
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
                    found.update(dict.fromkeys(list(record)[:100]))
            if problem is not None:
                yield number, Malformed(number, problem, line.text)
            else:
                yield number, values
            if number == CHUNK_ROWS:
                _check_seen(key, layout.columns, seen, found)
    if number < CHUNK_ROWS:
        _check_seen(key, layout.columns, seen, found)


def _check_seen(key: str, columns: Mapping[str, str | int], seen: set[str | int], found: Mapping[str, None]) -> None:
    missing = [(field, column) for field, column in columns.items() if column not in seen]
    if missing and found:
        raise _missing_column(key, missing, list(found)[:50])


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


def _read_parquet(path: Path, key: str, layout: Layout, chunk_rows: int) -> Iterator[Chunk]:
    try:
        with pq.ParquetFile(path) as file:
            names = tuple(file.schema_arrow.names)
            places, _ = _named_places(key, layout.columns, names)
            wanted = [names[place] for place in places]
            first = 1
            for batch in file.iter_batches(batch_size=chunk_rows, columns=list(dict.fromkeys(wanted))):
                columns = {field: _texts(key, column, batch.column(column)) for field, column in zip(layout.columns, wanted, strict=True)}
                index = pd.RangeIndex(first, first + batch.num_rows, name="row")
                yield Chunk(pd.DataFrame(columns, index=index, dtype="str"), ())
                first += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{key}: not a readable Parquet file: {error}") from None


def _texts(key: str, name: str, column: pa.Array) -> list[str | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise BadInputError(f"{key}: column {name!r} must hold text, got {column.type}")
    return list(pc.cast(column, pa.string()).to_pylist())
