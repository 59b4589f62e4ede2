"""How a delimited file is written: delimiter, quotes, header; and its records, in which stray quotes are plain characters.

A field is quoted only if a quote opens it, a quote closes it right before a delimiter or the record's end, and quotes inside are doubled.
Any other quote is a literal, so `he said "no"<TAB>refund` and `5" screen<TAB>sizes` have two fields each.
"""

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal, NamedTuple

from retune.data.encoding import MAX_RECORD, CutLine

__all__ = ["Assembler", "Dialect", "Record", "assemble", "sniff", "split_fields", "too_long"]

_DELIMITERS = ("\t", ";", ",", "|")
_NAMES = {"\t": "tab", ";": "semicolon", ",": "comma", "|": "bar"}
_MAX_RECORD_LINES = 1_000
_AHEAD = 4
"""Lines that are taken from the file at a time: each may be as long as a line may be."""

Ending = Literal["whole", "open", "broken"]


class Record(NamedTuple):
    fields: list[str]
    raw: str
    problem: str | None
    """Why the record is malformed; None for a good one."""


@dataclass(frozen=True)
class Dialect:
    delimiter: str
    quote: str
    """Quote character; empty: fields are never quoted."""
    names: tuple[str, ...] | None
    """The header's names; None without a header."""
    width: int
    """Fields of a record; 0 in an empty file, and where the lines that would tell are too long."""


@lru_cache(maxsize=16)
def _patterns(delimiter: str, quote: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    q, d = re.escape(quote), re.escape(delimiter)
    body = f" *{q}([^{q}]*(?:{q}{q}[^{q}]*)*)"
    return re.compile(f"{body}{q} *(?={d}|\\Z)"), re.compile(f"{body}\\Z")


@lru_cache(maxsize=16)
def _odd_run(quote: str) -> re.Pattern[str]:
    """An odd number of quotes in a row: nothing else ends a quoted field."""
    q = re.escape(quote)
    return re.compile(f"(?<!{q})(?:{q}{q})*{q}(?!{q})")


def split_fields(text: str, delimiter: str, quote: str) -> tuple[list[str], Ending]:
    """The fields of a record, and whether the record is whole.

    It is `open` when a quote opens a field and nothing in the text closes it, `broken` when a line break lies outside quotes.
    """
    fields, ending, _ = _scan(text, delimiter, quote)
    return fields, ending


def _scan(text: str, delimiter: str, quote: str) -> tuple[list[str], Ending, tuple[int, int]]:
    """Fields and ending as of `split_fields`; and of an open record number and place in the text of the field that a quote opens."""
    if not quote or quote not in text:
        return text.split(delimiter), "broken" if "\n" in text else "whole", (0, 0)
    quoted, unclosed = _patterns(delimiter, quote)
    fields: list[str] = []
    ending: Ending = "whole"
    opened = (0, 0)
    position = 0
    while True:
        # A field that begins with neither a quote nor a space is plain: most are, and a look costs less than a search.
        may_open = text.startswith((quote, " "), position)
        if may_open and (match := quoted.match(text, position)):
            fields.append(match[1].replace(quote * 2, quote))
            end = match.end()
        else:
            if may_open and ending == "whole" and unclosed.match(text, position):
                ending = "open"
                opened = (len(fields), position)
            end = text.find(delimiter, position)
            end = len(text) if end < 0 else end
            fields.append(text[position:end])
            if ending == "whole" and "\n" in fields[-1]:
                ending = "broken"
        if end >= len(text):
            return fields, ending, opened
        position = end + 1


class Assembler:
    """Iterates over the records of lines; blank lines are skipped. With `width`, another number of fields is a problem.

    A quote left open takes in the lines after it only if it closes properly and gives `width` fields; else it is a literal. However the
    quotes stand, each line is looked at a few times and no more.
    """

    def __init__(self, lines: Iterable[str], delimiter: str, quote: str, width: int | None, longest: int = MAX_RECORD) -> None:
        self.taken = 0
        """Lines behind the last record, those that were skipped included."""
        self._source = iter(lines)
        self._delimiter, self._quote, self._width, self._longest = delimiter, quote, width, longest
        self._waiting: deque[str] = deque()
        # Of lines ahead that a search went through: one that they leave open is the same, and closes where that did or never.
        self._searched: deque[int | None] = deque()

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        waiting, quote, width = self._waiting, self._quote, self._width
        while True:
            line = waiting.popleft() if waiting else next(self._source)
            self.taken += 1
            known = bool(self._searched)
            rest = self._searched.popleft() if known else None
            if isinstance(line, CutLine):
                return Record([], str(line), too_long(self._longest))
            if not line.strip(" \r"):
                continue
            raw = line
            if not quote or quote not in raw:
                fields, ending, place = raw.split(self._delimiter), "whole", 0
            else:
                fields, ending, (place, _) = _scan(raw, self._delimiter, quote)
            if ending == "open" and (not known or (rest is not None and (place + rest == width or len(fields) != width))):
                taken: list[str] = []
                joined, searched = _close(raw, waiting, self._source, taken, self._delimiter, quote, self._longest)
                if joined is not None and (width is None or len(joined[0]) == width or len(fields) != width):
                    fields, raw = joined
                    self.taken += len(taken)
                    self._searched.clear()
                else:
                    waiting.extendleft(reversed(taken))
                    self._searched = searched
            problem = None if width is None or len(fields) == width else f"{len(fields)} field(s), expected {width}"
            return Record(fields, raw, problem)

    def ahead(self, lines: int, characters: int) -> list[str]:
        """The lines that come next: so many or a few more, or fewer of many characters; none at the end."""
        size = sum(map(len, self._waiting))
        while len(self._waiting) < lines and size < characters and (some := list(islice(self._source, _AHEAD))):
            self._waiting.extend(some)
            size += sum(map(len, some))
        return list(self._waiting)

    def skip(self, lines: int) -> None:
        """Leaves out lines of those `ahead`: the caller knows that each is a record of its own."""
        for _ in range(lines):
            self._waiting.popleft()
        for _ in range(min(lines, len(self._searched))):
            self._searched.popleft()
        self.taken += lines


def assemble(lines: Iterable[str], delimiter: str, quote: str, width: int | None, longest: int = MAX_RECORD) -> Iterator[Record]:
    """The records of lines; see `Assembler`."""
    return Assembler(lines, delimiter, quote, width, longest)


def too_long(characters: int) -> str:
    return f"line longer than {characters:,} characters (source.max_record_characters)"


def _close(
    first: str,
    waiting: deque[str],
    source: Iterator[str],
    taken: list[str],
    delimiter: str,
    quote: str,
    longest: int,
) -> tuple[tuple[list[str], str] | None, deque[int | None]]:
    """The record that begins with `first` and whose open quote a later line closes; `taken` lists the lines read for it.

    Fields that are closed are not read again, so that the time grows with the characters alone. Also returned is what the search tells
    of the lines after the first, should each begin a record and leave a quote open: how many fields the record has from that quote on,
    or None where the record never ends.
    """
    fields, _, (place, start) = _scan(first, delimiter, quote)
    closed, parts = fields[:place], [first[start:]]
    record, size = [first], len(first)
    before: list[int] = []
    """Fields that are closed before the quote that each line taken leaves open."""
    while len(taken) < _MAX_RECORD_LINES:
        line = waiting.popleft() if waiting else next(source, None)
        if line is None:
            return None, _never(len(taken))
        taken.append(line)
        size += len(line) + 1
        if isinstance(line, CutLine):
            return None, _never(len(taken) - 1)
        if size > longest:
            break
        record.append(line)
        parts.append(line)
        if _odd_run(quote).search(line):
            text = "\n".join(parts)
            fields, ending, (place, start) = _scan(text, delimiter, quote)
            if ending == "whole":
                closed += fields
                return (closed, "\n".join(record)), deque(len(closed) - count for count in before)
            if ending == "broken":
                return None, _never(len(taken) - 1)
            closed += fields[:place]
            parts = [text[start:]]
        before.append(len(closed))
    # A record that begins later may go on for longer; searching again from the middle on makes it at most twice the work.
    return None, _never(len(taken) // 2)


def _never(lines: int) -> deque[int | None]:
    return deque([None] * lines)


def sniff(
    lines: Sequence[str],
    *,
    suffix: str,
    columns: Mapping[str, str | int],
    target: str,
    labels: Iterable[str],
    delimiter: str | None,
    quote: str | None,
    header: bool | None,
) -> tuple[Dialect, list[str]]:
    """The dialect of a file from its first lines, and what was assumed. What the caller gives is taken as it is."""
    assumptions = []
    if quote is None:
        quote = _find_quote(lines, delimiter or ("\t" if suffix == "tsv" else ","))
        if quote == "'":
            assumptions.append("fields are quoted with ' (all fields of a column are)")
    names = {name.strip().casefold() for name in columns.values() if isinstance(name, str)}
    if delimiter is None:
        delimiter = _find_delimiter(lines, quote, names, "\t" if suffix == "tsv" else ",")
        if delimiter != ("\t" if suffix == "tsv" else ","):
            assumptions.append(f"fields are separated by {_NAMES[delimiter]}")
    records = [record.fields for record in assemble(lines, delimiter, quote, None)]
    if not records:
        return Dialect(delimiter, quote, None, 0), assumptions
    if header is None:
        header = _has_header(records, columns, names, target, {label.casefold() for label in labels})
        assumptions.append("the first line is a header" if header else "no header: the first line is data")
    if header:
        found = tuple(name.strip() for name in records[0])
        return Dialect(delimiter, quote, found, len(found)), assumptions
    widths = Counter(len(fields) for fields in records if fields).most_common(1)  # a line that is too long has none
    return Dialect(delimiter, quote, None, widths[0][0] if widths else 0), assumptions


def _find_quote(lines: Sequence[str], delimiter: str) -> str:
    """`'` only if it wraps every filled field of some column, in two records at least; else `"`, which is harmless as a stray."""
    columns: dict[int, list[str]] = {}
    for line in lines[1:]:
        for place, field in enumerate(line.split(delimiter)):
            if field.strip():
                columns.setdefault(place, []).append(field.strip())
    for fields in columns.values():
        if len(fields) > 1 and all(len(field) > 1 and field[0] == field[-1] == "'" for field in fields):
            return "'"
    return '"'


def _find_delimiter(lines: Sequence[str], quote: str, names: set[str], usual: str) -> str:
    scores: dict[str, tuple[bool, float, bool]] = {}
    for delimiter in _DELIMITERS:
        records = [record.fields for record in assemble(lines, delimiter, quote, None)]
        if not records:
            continue
        width, agreeing = Counter(len(fields) for fields in records).most_common(1)[0]
        named = bool(names) and names <= {name.strip().casefold() for name in records[0]}
        if width > 1 or named:
            scores[delimiter] = (named, agreeing / len(records), delimiter == usual)
    return max(scores, key=lambda delimiter: scores[delimiter]) if scores else usual


def _has_header(records: Sequence[Sequence[str]], columns: Mapping[str, str | int], names: set[str], target: str, labels: set[str]) -> bool:
    first = [field.strip().casefold() for field in records[0]]
    if names & set(first):
        return True
    places = {field: place for field, place in columns.items() if isinstance(place, int) and place < len(first)}
    if any(first[place] == field.casefold() for field, place in places.items()):
        return True
    place = places.get(target)
    if place is None or not labels or first[place] in labels:
        return False
    rest = [fields[place].strip().casefold() for fields in records[1:] if place < len(fields)]
    return len(rest) > 1 and all(value in labels for value in rest)
