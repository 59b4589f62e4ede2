"""Records are found by the definition, in however few looks at each line."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retune.data import dialect
from retune.data.dialect import Assembler, assemble, split_fields

Found = list[tuple[list[str], str, bool]]


def defined(lines: list[str], width: int | None) -> Found:
    """Each open quote is followed anew: the first line that ends the record or breaks it decides."""
    records: Found = []
    place = 0
    while place < len(lines):
        raw, last = lines[place], place
        if raw.strip(" \r"):
            fields, ending = split_fields(raw, ",", '"')
            while ending == "open" and last + 1 < len(lines):
                last += 1
                joined = "\n".join(lines[place : last + 1])
                more, ending = split_fields(joined, ",", '"')
                if ending == "whole" and (width is None or len(more) == width or len(fields) != width):
                    fields, raw, place = more, joined, last
            records.append((fields, raw, width is not None and len(fields) != width))
        place += 1
    return records


def found(lines: list[str], width: int | None) -> Found:
    records = assemble(lines, ",", '"', width)
    return [(record.fields, record.raw, record.problem is not None) for record in records]


@given(
    lines=st.lists(st.text('",a ', max_size=7) | st.sampled_from(['x,"a', 'b","c', 'd"', '5","multi', 'line",low', "low,x"]), max_size=8),
    width=st.none() | st.integers(1, 4),
)
@example(lines=['x,"stray,low', '5","multi', 'line",low'], width=3)
@example(lines=['low,"a', 'b","c', 'd"'], width=2)
@settings(deadline=None, max_examples=1_500)
def test_records_are_those_of_the_definition(lines: list[str], width: int | None) -> None:
    assert found(lines, width) == defined(lines, width)


def test_a_stray_quote_costs_no_row_after_it() -> None:
    assert found(['x,"stray,low', '5","multi', 'line",low'], 3) == [
        (["x", '"stray', "low"], 'x,"stray,low', False),
        (['5"', "multi\nline", "low"], '5","multi\nline",low', False),
    ]


def test_a_record_is_found_though_a_search_before_it_reached_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "_MAX_RECORD_LINES", 10)
    lines = ['x,"stray', *['b","c'] * 10, 'b","c', 'd"']
    assert (["b", 'b"', "c\nd"], 'b","c\nd"', True) not in found(lines, 2)
    assert (['b"', "c\nd"], 'b","c\nd"', False) in found(lines, 2)


def test_lines_that_are_left_out_are_left_out_of_a_search() -> None:
    records = Assembler(['x,"stray', "low,x", "low,y", 'low,"a', 'b"'], ",", '"', 2)
    assert next(records).fields == ["x", '"stray']
    assert len(records.ahead(2, 100)) >= 2
    records.skip(2)
    assert next(records).fields == ["low", "a\nb"]
