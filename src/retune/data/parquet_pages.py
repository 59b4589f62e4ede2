"""What a Parquet file says of itself, read before a library trusts it.

pyarrow follows a schema's groups by recursion, which a deep one crashes, and lays out a page at the size that the page's header names,
whatever the footer says of it. Both stand in Thrift's compact protocol, of which this reads as much as it takes.
"""

import mmap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retune.errors import BadInputError

__all__ = ["Pages", "read_footer", "read_pages"]

_MAX_FOOTER = 32 << 20
_MAX_DEPTH = 32
"""Groups within groups of a schema, and structures within structures of Thrift."""
_MAX_VALUES = 2_000_000
"""Of a footer: as Python's objects they take up to a hundred bytes each."""
_DELTA_BYTE_ARRAY = 7
_BINARY, _LIST, _SET, _STRUCT = 8, 9, 10, 12


@dataclass(frozen=True)
class Pages:
    """Of the columns that are wanted."""

    unpacked: int
    """Bytes of all their pages once decompressed."""
    largest: int
    """Bytes of the largest page."""
    shared_starts: bool
    """Whether texts are told by what they have in common with the one before, so that they may be far longer than the pages."""


class _Reader:
    """Thrift's compact protocol over bytes. Whatever it reads, it ends, in IndexError or ValueError where the bytes do."""

    def __init__(self, data: Any, place: int) -> None:
        self._data = data
        self.place = place
        self._left = _MAX_VALUES

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Field number -> value. A field that is there twice, or whose number pyarrow would cut short, is read by no two readers alike."""
        if depth > _MAX_DEPTH:
            raise ValueError("structures lie too deep")
        fields: dict[int, Any] = {}
        last = 0
        while head := self._byte():
            last = last + (head >> 4) if head >> 4 else self._integer()
            if last in fields or not 0 < last < 1 << 15:
                raise ValueError(f"field {last} is there twice, or is none")
            fields[last] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise BadInputError(f"its footer holds more than {_MAX_VALUES:,} values; write larger row groups")
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._number())
        if kind in (_LIST, _SET):
            return self._items(depth)
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"unknown type {kind}")

    def _items(self, depth: int) -> list[Any]:
        head = self._byte()
        count = head >> 4
        if count == 15:
            count = self._number()
        kind = head & 15
        if depth > _MAX_DEPTH or count > len(self._data) - self.place:  # each item takes a byte at least
            raise ValueError(f"a list of {count} items lies too deep, or cannot be in so few bytes")
        if kind in (1, 2):  # in a list, each takes a byte of its own
            kind = 3
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _byte(self) -> int:
        byte: int = self._data[self.place]
        self.place += 1
        return byte

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self.place:
            raise ValueError("a text goes beyond the end")
        self.place += count
        data: bytes = self._data[self.place - count : self.place]
        return data

    def _number(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("a number takes too many bytes")

    def _integer(self) -> int:
        number = self._number()
        return number >> 1 ^ -(number & 1)


def read_footer(path: Path) -> dict[int, Any]:
    """The footer, field number -> value. Raises BadInputError for what is no Parquet file, or one whose schema is too deep."""
    with _opened(path) as data:
        length = int.from_bytes(data[-8:-4], "little")
        if data[-4:] != b"PAR1" or data[:4] != b"PAR1" or length > len(data) - 12:
            raise ValueError("it does not begin and end as one")
        if length > _MAX_FOOTER:
            raise BadInputError(f"its footer takes {length:,} bytes, at most {_MAX_FOOTER:,} are read; write larger row groups")
        footer = _Reader(data[-8 - length : -8], 0).struct()
        _check_depth(footer[2])
        return footer


def read_pages(path: Path, footer: dict[int, Any], wanted: Collection[str], most: float) -> Pages:
    """Reads the header of each page of the `wanted` columns, as far as until they hold more than `most` bytes unpacked.

    Raises BadInputError where a part of the file lies outside of it, or stands for several.
    """
    unpacked, largest, shared = 0, 0, False
    with _opened(path) as data:
        left = len(data)
        for group in footer.get(4, []):
            for chunk in group[1]:
                if 1 in chunk:
                    raise ValueError("columns in other files are not read")
                column = chunk[3]
                if column[3][0].decode() not in wanted:
                    continue
                left -= column[7]
                if left < 0:
                    raise ValueError("its columns take more bytes than it has")
                for page in _pages(data, column):
                    unpacked += page[2]
                    if unpacked > most:
                        return Pages(unpacked, largest, shared)
                    largest = max(largest, page[2])
                    shared |= _DELTA_BYTE_ARRAY in (page.get(5, {}).get(2), page.get(8, {}).get(4))
    return Pages(unpacked, largest, shared)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file's bytes. Whatever its reader stumbles over comes out as BadInputError."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"not a readable Parquet file: {error}") from None


def _pages(data: Any, column: dict[int, Any]) -> Iterator[dict[int, Any]]:
    place = column[9]
    if 0 < column.get(11, 0) < place:
        place = column[11]
    end = place + column[7]
    if not 0 <= place <= end <= len(data):
        raise ValueError("a column lies outside of the file")
    while place < end:
        reader = _Reader(data, place)
        page = reader.struct()
        if page[2] < 0 or page[3] < 0 or reader.place + page[3] > end:
            raise ValueError("a page lies outside of its column")
        yield page
        place = reader.place + page[3]


def _check_depth(schema: list[dict[int, Any]]) -> None:
    """The schema is a list in which each group stands before its children."""
    left: list[int] = []
    for element in schema:
        while left and not left[-1]:
            left.pop()
        if left:
            left[-1] -= 1
        if children := element.get(5, 0):
            if children < 0:
                raise ValueError("a group has fewer than no columns")
            left.append(children)
        if len(left) > _MAX_DEPTH:
            raise BadInputError(f"its columns lie more than {_MAX_DEPTH} groups deep; land a file whose columns are plain")
