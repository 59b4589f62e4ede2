"""What fails and why is the schema's word on each row, whichever rows it is shown."""

import pandas as pd
import pandera.pandas as pandera
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.data.schema import Fields, build_schema, failures

CASES = {
    "labels": Fields(("text",), "label", ("low", "high"), {"channel": ("chat", "email"), "region": None}, 3, 8),
    "free target": Fields(("text", "more"), "answer", (), {"channel": ("chat",)}, 1, 5),
    "an input that is a slice": Fields(("text", "channel"), "label", ("low",), {"channel": ("chat", "mail"), "text": None}, 4, 6),
}
CELLS = st.none() | st.sampled_from(["low", "high", "chat", "email", "mail", "", "é", "abcd"]) | st.text("aé ", max_size=10)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_rows_that_fail_are_those_that_the_schema_finds_among_all(fields: Fields, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 6))
    cells = {name: data.draw(st.lists(CELLS, min_size=count, max_size=count)) for name in fields.names}
    frame = pd.DataFrame({name: pd.Series(values, dtype="str") for name, values in cells.items()})
    frame.index = pd.Index(range(1, count + 1), name="row", dtype="int64")
    schema = build_schema(fields)
    expected: set[int] = set()
    try:
        schema.validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        expected = set(error.failure_cases["index"].astype(int))
    assert set(failures(frame, schema, fields).index) == expected
