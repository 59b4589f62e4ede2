"""Records parsed many at a time are those that come one by one, in the same chunks."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retune.data import bulk, dialect, read
from retune.data.read import Layout, open_reading

LAYOUT = Layout(columns={"text": "text", "label": "label"}, target="label", labels=("low",), header=True, delimiter=",", quote='"')
ODD = ["a", "", " ", "b c", '"q"', '"a,b"', '"a""b"', '""', '5" x', '"open', 'shut"', ' "s"', '"s" ', '"a"b', "\ufeff", "\ufffd", "é", "\r"]
FIELDS = st.sampled_from(ODD)
RECORDS = st.lists(FIELDS, min_size=2, max_size=2) | st.lists(FIELDS, min_size=1, max_size=4)
LINES = st.lists(RECORDS.map(",".join) | st.just("") | st.text('ab",\r \ufeff\x00', max_size=8), max_size=25)


def chunks(path: Path, layout: Layout, chunk_rows: int) -> list[tuple[list[int], list[list[str]], list[tuple[int, str, str]]]]:
    return [
        (chunk.frame.index.tolist(), chunk.frame.to_numpy().tolist(), [(item.row, item.reason, item.raw) for item in chunk.malformed])
        for chunk in open_reading(path, "a.csv", layout, chunk_rows).chunks
    ]


@pytest.mark.parametrize("ahead", [1, 3, 16_000])
@pytest.mark.parametrize("delimiter", [",", "\t", " ", ";"])
@given(lines=LINES, end=st.sampled_from(["\n", "\r\n"]), chunk_rows=st.sampled_from([1, 3, 100]), quote=st.sampled_from(['"', "'", ""]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_result_depends_on_the_way_a_record_went(
    ahead: int,
    delimiter: str,
    lines: list[str],
    end: str,
    chunk_rows: int,
    quote: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.csv"
    content = end.join(["label,text", *lines]).replace('"', quote or '"').replace(",", delimiter)
    path.write_bytes(content.encode())
    layout = Layout(**{**LAYOUT.__dict__, "delimiter": delimiter, "quote": quote})
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "_LINES", ahead)
        patch.setattr(dialect, "_AHEAD", 1)
        patch.setattr(read, "_CHUNK_CHARACTERS", 60)
        found = chunks(path, layout, chunk_rows)
        patch.setattr(read, "can_parse", lambda dialect: False)
        assert found == chunks(path, layout, chunk_rows)


def test_plain_records_are_parsed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the property above would not notice: that nothing goes the fast way."""
    three = 'low,x\nlow,"a, ""b"""\nlow,5" wide\n'
    (tmp_path / "a.csv").write_text(f"label,text\n{three * 50}", "utf-8")
    seen: list[int] = []
    parsed = bulk._parsed
    monkeypatch.setattr(bulk, "_parsed", lambda texts, *rest: seen.append(len(texts)) or parsed(texts, *rest))
    ((numbers, rows, malformed),) = chunks(tmp_path / "a.csv", LAYOUT, 1_000)
    assert (numbers, malformed) == (list(range(1, 151)), [])
    assert rows[:3] == [["x", "low"], ['a, "b"', "low"], ['5" wide', "low"]]
    assert seen == [100]
