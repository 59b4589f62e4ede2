"""Records of delimited files many at a time: lines that are plainly a record each are parsed at once, the others one by one, in order.

What a record is, `retune.data.dialect` says; one expression tells a line that is one whatever stands around it, and knows quotes only
right beside delimiters. No result depends on which way a record went.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from retune.data.dialect import Assembler, Dialect, Record
from retune.data.encoding import CutLine

__all__ = ["Batch", "can_parse", "read_batches"]

_LINES = 16_000
_CHARACTERS = 4_000_000
_MAX_WIDTH = 50

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    numbers: Ints
    """Of the records that were parsed at once."""
    columns: list[pa.Array]
    """Their fields at the wanted places."""
    others: list[tuple[int, Record]]
    """Number and record of each that was not, in order."""


def can_parse(dialect: Dialect) -> bool:
    """No delimiter of blanks: spaces around quotes, and lines of them, mean something else then."""
    plain = len(dialect.delimiter.encode()) == 1 and dialect.delimiter not in " \r" and len(dialect.quote.encode()) <= 1
    return 1 < dialect.width <= _MAX_WIDTH and plain


def read_batches(records: Assembler, dialect: Dialect, places: list[int]) -> Iterator[Batch]:
    """All records that are left, numbered from 1."""
    plain = _plain(dialect)
    number = 1
    while lines := records.ahead(_LINES, _CHARACTERS):
        alone = plain(lines)
        begun, count = records.taken, len(lines)
        runs: list[tuple[int, int, int]] = []
        others: list[tuple[int, Record]] = []
        place = 0
        for odd in [*np.flatnonzero(~alone).tolist(), count]:
            if odd < place:
                continue  # a record before it took it in
            runs.append((place, odd, number))
            number += odd - place
            records.skip(odd - place)
            place = odd
            if odd == count:
                break
            record = next(records, None)
            if record is None:
                break
            others.append((number, record))
            number += 1
            place = records.taken - begun
        texts = list(chain.from_iterable(lines[first:end] for first, end, _ in runs))
        numbers = np.concatenate([np.arange(end - first) + start for first, end, start in runs]).astype(np.int64)
        yield Batch(numbers, _parsed(texts, dialect, places), others)


def _plain(dialect: Dialect) -> Callable[[list[str]], npt.NDArray[np.bool_]]:
    """Which lines are a record each: fields without quotes or wholly within them, as many as they should be.

    Characters that some reader or other treats in its own way are left to the definition.
    """
    special = r"\r\n\x00\x{feff}\x{fffd}"
    delimiter, quote = re.escape(dialect.delimiter), re.escape(dialect.quote)
    field = f"[^{delimiter}{quote}{special}]*"
    if quote:
        field = f"(?:{quote}(?:[^{quote}{special}]|{quote}{quote})*{quote}|{field})"
    pattern = rf"\A{field}(?:{delimiter}{field}){{{dialect.width - 1}}}\z"

    def alone(lines: list[str]) -> npt.NDArray[np.bool_]:
        plain: npt.NDArray[np.bool_] = np.asarray(pc.match_substring_regex(pa.array(lines, pa.large_string()), pattern))
        plain &= np.array([not isinstance(line, CutLine) for line in lines])
        return plain

    return alone


def _parsed(texts: list[str], dialect: Dialect, places: list[int]) -> list[pa.Array]:
    if not texts:
        return [pa.array([], pa.large_string()) for _ in places]
    data = "\n".join(texts).encode()
    names = [str(place) for place in range(dialect.width)]
    table = csv.read_csv(
        pa.BufferReader(data),
        csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
        csv.ParseOptions(delimiter=dialect.delimiter, quote_char=dialect.quote or False, ignore_empty_lines=False),
        csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.large_string()),
            include_columns=list(dict.fromkeys(names[place] for place in places)),
            strings_can_be_null=False,
        ),
    )
    return [table.column(names[place]).combine_chunks() for place in places]
