"""What fails and why is the schema's word on each row, whichever rows it is shown."""

import pandas as pd
import pandera.pandas as pandera
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.data.schema import Fields, build_schema, failures, tidy
from retune.text import normalise

CASES = {
    "labels": Fields(("text",), "label", ("low", "high"), {"channel": ("chat", "email"), "region": None}, 3, 8),
    "free target": Fields(("text", "more"), "answer", (), {"channel": ("chat",)}, 1, 5),
    "an input that is a slice": Fields(("text", "channel"), "label", ("low",), {"channel": ("chat", "mail"), "text": None}, 4, 6),
}
CELLS = st.none() | st.sampled_from(["low", "high", "chat", "email", "mail", "", "é", "abcd"]) | st.text("aé ", max_size=10)
SPELLED = CELLS | st.sampled_from(["LOW", " Low", "Chat ", "MAIL", "other", " "])


def frame_of(fields: Fields, cells: st.SearchStrategy[str | None], data: st.DataObject) -> pd.DataFrame:
    count = data.draw(st.integers(0, 6))
    columns = {name: data.draw(st.lists(cells, min_size=count, max_size=count)) for name in fields.names}
    frame = pd.DataFrame({name: pd.Series(values, dtype="str") for name, values in columns.items()})
    frame.index = pd.Index(range(1, count + 1), name="row", dtype="int64")
    return frame


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_rows_that_fail_are_those_that_the_schema_finds_among_all(fields: Fields, data: st.DataObject) -> None:
    frame = frame_of(fields, CELLS, data)
    schema = build_schema(fields)
    expected: set[int] = set()
    try:
        schema.validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        expected = set(error.failure_cases["index"].astype(int))
    assert set(failures(frame, schema, fields).index) == expected


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_each_cell_is_tidied_as_it_would_be_alone(fields: Fields, data: st.DataObject) -> None:
    frame = frame_of(fields, SPELLED, data)
    found = tidy(frame, fields)
    respelled: dict[str, set[tuple[str, str]]] = {}
    for name in fields.names:
        declared = {value.casefold(): value for value in fields.allowed(name) or ()}
        expected: list[str | None] = []
        for cell in frame[name]:
            text = "" if pd.isna(cell) else normalise(cell)
            right = text if text in declared.values() else declared.get(text.casefold(), text)
            if right != text:
                respelled.setdefault(name, set()).add((text, right))
            expected.append(right or None)
        assert [None if pd.isna(cell) else cell for cell in found.frame[name]] == expected
    assert found.respelled == respelled
    assert found.frame.index.equals(frame.index)
