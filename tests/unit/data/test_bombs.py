"""Files made to fill memory, to crash a library or to take for ever: each ends soon, in little memory, with a reason and a way out."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retune.data.dialect import assemble
from retune.data.encoding import first_lines
from retune.data.ingest import layout_of
from retune.data.parquet_pages import read_pages
from retune.data.read import open_reading
from retune.errors import BadInputError

MEGABYTE = 1 << 20

READ = """
import json, resource, sys
from pathlib import Path
from retune.data.read import Layout, open_reading
from retune.errors import BadInputError

def peak():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) >> 10

found = {}
for name in sys.argv[1:]:
    path = Path(name)
    Path("/proc/self/clear_refs").write_text("5")
    before, rows, malformed, error = peak(), 0, 0, None
    try:
        for chunk in open_reading(path, path.name, Layout({"text": "text", "label": "label"}, "label", ("low", "high"))).chunks:
            rows, malformed = rows + len(chunk.frame), malformed + len(chunk.malformed)
    except BadInputError as caught:
        error = str(caught)
    found[path.name] = {"megabytes": peak() - before, "rows": rows, "malformed": malformed, "error": error}
print(json.dumps(found))
"""


def thrift(*fields: tuple[int, int, bytes]) -> bytes:
    """A structure in Thrift's compact protocol, of (number, type, value) in ascending order."""
    out, last = b"", 0
    for number, kind, value in fields:
        out += bytes([(number - last) << 4 | kind]) + value
        last = number
    return out + b"\0"


def footed(footer: bytes) -> bytes:
    """A Parquet file of nothing else."""
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def number(value: int) -> bytes:
    """As Thrift writes the length of a text."""
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def integer(value: int) -> bytes:
    return number(value << 1 ^ value >> 63)


def deep_parquet(groups: int) -> bytes:
    group = thrift((3, 5, integer(1)), (4, 8, b"\1g"), (5, 5, integer(1)))
    schema = thrift((4, 8, b"\1r"), (5, 5, integer(1))) + group * groups + thrift((1, 5, integer(6)), (3, 5, integer(1)), (4, 8, b"\4text"))
    return footed(thrift((1, 5, integer(1)), (2, 9, b"\xfc" + number(groups + 2) + schema), (3, 6, integer(0)), (4, 9, b"\x0c")))


def shared_parquet(groups: int, pages: int) -> bytes:
    """Row groups without rows, whose columns are all the same empty pages."""
    sub = (5, 12, thrift((1, 5, integer(0)), (2, 5, integer(0)), (3, 5, integer(3)), (4, 5, integer(3))))
    page = thrift((1, 5, integer(0)), (2, 5, integer(0)), (3, 5, integer(0)), sub)
    schema = thrift((4, 8, b"\1r"), (5, 5, integer(2)))
    chunks = b""
    for name in (b"text", b"label"):
        text = number(len(name)) + name
        schema += thrift((1, 5, integer(6)), (3, 5, integer(1)), (4, 8, text), (6, 5, integer(0)))
        size = integer(len(page) * pages)
        about = [(1, 5, integer(6)), (2, 9, b"\x15" + integer(0)), (3, 9, b"\x18" + text), (4, 5, integer(0)), (5, 6, integer(0))]
        chunks += thrift((2, 6, integer(4)), (3, 12, thrift(*about, (6, 6, size), (7, 6, size), (9, 6, integer(4)))))
    group = thrift((1, 9, b"\x2c" + chunks), (2, 6, integer(0)), (3, 6, integer(0)))
    fields = (1, 5, integer(1)), (2, 9, b"\x3c" + schema), (3, 6, integer(0)), (4, 9, b"\xfc" + number(groups) + group * groups)
    body, footer = page * pages, thrift(*fields)
    return b"PAR1" + body + footer + struct.pack("<I", len(footer)) + b"PAR1"


def table(texts: Any) -> pa.Table:
    return pa.table({"text": texts, "label": pa.array(["low"] * len(texts))})


def write_bombs(folder: Path) -> None:
    zeros = gzip.compress(bytes(64 * MEGABYTE))
    (folder / "zeros.csv.gz").write_bytes(zeros * (MEGABYTE // len(zeros)))  # 1 GB in 1 MB
    lines = gzip.compress(b"\n" * 64 * MEGABYTE)
    (folder / "lines.jsonl.gz").write_bytes(lines * 4)
    references = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, "int32"), pa.array(["x" * 400_000]))
    pq.write_table(table(references), folder / "references.parquet")  # 8 GB
    pq.write_table(table(["x" * MEGABYTE] * 100), folder / "page.parquet", compression="zstd", use_dictionary=False)
    size = pq.read_metadata(folder / "page.parquet").row_group(0).column(0).total_uncompressed_size
    honest = (folder / "page.parquet").read_bytes()
    assert integer(size) in honest
    (folder / "liar.parquet").write_bytes(honest.replace(integer(size), integer(size)[:-1] + b"\1"))
    texts = ["x" * 50_000 + str(row) for row in range(1_600)]
    encoded: dict[str, Any] = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(table(texts), folder / "shared.parquet", **encoded)
    (folder / "deep.parquet").write_bytes(deep_parquet(100_000))
    (folder / "same.parquet").write_bytes(shared_parquet(8_700, 20_000))
    items = 30 * MEGABYTE
    (folder / "structs.parquet").write_bytes(footed(thrift((5, 9, b"\xfc" + number(items) + bytes(items)))))
    (folder / "quote.csv").write_text("text,label\n" + 'fine,"low\n' * 2 + '"' + "words and more\n" * 300_000)
    (folder / "fields.csv").write_text("text,label\n" + '"a",' * 240_000 + "\nfine,low\n")
    (folder / "wide.csv").write_text(",".join(f"c{place}" for place in range(100_000)) + ",text,label\n")
    (folder / "long.csv").write_text("text,label\n" + ("\N{GRINNING FACE}" * 999_000 + ",low\n") * 20)
    (folder / "nested.jsonl").write_text("[" * 900_000 + "\n" + '{"a":' * 150_000 + "\n" + '{"text": "fine", "label": "low"}\n')
    (folder / "one_line.jsonl").write_text('{"text": "x", "label": "low"}, ' * 300_000)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Read in a process of its own, which a library may crash, and whose memory is nobody else's."""
    folder = tmp_path_factory.mktemp("bombs")
    write_bombs(folder)
    done = subprocess.run([sys.executable, "-c", READ, *map(str, sorted(folder.iterdir()))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zeros.csv.gz", "source.max_expansion"),
        ("lines.jsonl.gz", "source.max_expansion"),
        ("references.parquet", "source.max_expansion"),
        ("page.parquet", "source.max_expansion"),
        ("liar.parquet", "source.max_expansion"),
        ("shared.parquet", "source.max_expansion"),
        ("deep.parquet", "groups deep"),
        ("same.parquet", "more bytes than it has"),
        ("structs.parquet", "footer holds more than 2,000,000 values; write larger row groups"),
        ("wide.csv", "100,002 columns, at most 1,000 are read; raise source.max_columns"),
    ],
)
def test_a_bomb_is_refused_with_the_objects_name_and_the_way_out(outcomes: dict[str, Any], name: str, words: str) -> None:
    error = outcomes[name]["error"]
    assert error is not None
    assert error.startswith(f"{name}: ")
    assert words in error


@pytest.mark.parametrize(
    ("name", "rows", "malformed"),
    [
        ("quote.csv", 2, 300_000),
        ("fields.csv", 1, 1),
        ("long.csv", 20, 0),
        ("nested.jsonl", 1, 2),
        ("one_line.jsonl", 0, 1),
    ],
)
def test_where_one_record_is_at_fault_the_others_are_read(outcomes: dict[str, Any], name: str, rows: int, malformed: int) -> None:
    assert outcomes[name]["error"] is None
    assert (outcomes[name]["rows"], outcomes[name]["malformed"]) == (rows, malformed)


def test_no_bomb_takes_more_memory_than_a_few_hundred_megabytes(outcomes: dict[str, Any]) -> None:
    assert {name: found["megabytes"] for name, found in outcomes.items() if found["megabytes"] > 350} == {}


def test_a_user_can_raise_each_limit(tmp_path: Path, make: Any) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\n" + b" " * 80 * MEGABYTE + b"\nfine,low\n"))
    with pytest.raises(BadInputError, match=r"a\.csv\.gz: holds more than .* source\.max_expansion"):
        list(open_reading(tmp_path / "a.csv.gz", "a.csv.gz", layout_of(make())).chunks)
    layout = layout_of(make(source={"path": "landing", "max_expansion": 5_000}))
    [chunk] = open_reading(tmp_path / "a.csv.gz", "a.csv.gz", layout).chunks
    assert (len(chunk.frame), len(chunk.malformed)) == (1, 1)

    (tmp_path / "b.jsonl").write_text('{"text": "' + "x" * 2_000_000 + '", "label": "low"}\n')
    [chunk] = open_reading(tmp_path / "b.jsonl", "b.jsonl", layout_of(make())).chunks
    assert [item.reason for item in chunk.malformed] == ["line longer than 1,000,000 characters (source.max_record_characters)"]
    layout = layout_of(make(source={"path": "landing", "max_record_characters": 3_000_000}))
    assert [len(chunk.frame) for chunk in open_reading(tmp_path / "b.jsonl", "b.jsonl", layout).chunks] == [1]

    (tmp_path / "c.csv").write_text(",".join(f"c{place}" for place in range(1_000)) + ",text,label\n" + "," * 1_000 + "x,low\n")
    with pytest.raises(BadInputError, match=r"c\.csv: has 1,002 columns"):
        list(open_reading(tmp_path / "c.csv", "c.csv", layout_of(make())).chunks)
    layout = layout_of(make(source={"path": "landing", "max_columns": 2_000}))
    assert [len(chunk.frame) for chunk in open_reading(tmp_path / "c.csv", "c.csv", layout).chunks] == [1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", ['x","y' * 10, 'x,"a' + 'b""c' * 10, '"x","y', 'x""",y', '"', "'", '","'])
def test_records_are_found_in_time_that_grows_with_the_characters(line: str) -> None:
    lines = [line] * 20_000
    assert sum(len(record.raw) + 1 for record in assemble(lines, ",", '"', 500)) == sum(len(item) + 1 for item in lines)


@pytest.mark.parametrize(
    "page",
    [
        b"\x15" + integer(0) + b"\x15" + integer(10) + b"\x05" + integer(2) + integer(20),
        b"\x15" + integer(0) + b"\x15" + integer(10) + b"\x05" + integer(2 - (1 << 16)) + integer(20),
        b"\x15" + integer(0) + b"\x15" + integer(10) + b"\x05" + integer(2 + (1 << 16)) + integer(20),
    ],
)
def test_a_page_does_not_tell_its_size_to_each_reader_in_another_way(tmp_path: Path, page: bytes) -> None:
    """A field a second time, and under numbers that pyarrow takes for the same."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + page + b"\x15" + integer(0) + b"\0" + bytes(8) + b"PAR1")
    chunk = {3: {3: [b"text"], 7: 20, 9: 4}}
    with pytest.raises(BadInputError, match="is there twice, or is none"):
        read_pages(tmp_path / "a.parquet", {4: [{1: [chunk]}]}, ["text"], 1_000)


@pytest.mark.parametrize("header", [True, None, False])
def test_a_file_whose_lines_are_too_long_to_tell_its_columns_is_refused(tmp_path: Path, make: Any, header: bool | None) -> None:
    columns: dict[str, str | int] = {"text": 0, "label": 1} if header is False else {"text": "text", "label": "label"}
    (tmp_path / "a.csv").write_text("\n" + "text,label," + "x" * 2_000_000 + "\nfine,low" * (header is not False) + "\n")
    layout = layout_of(make(source={"path": "landing", "header": header, "columns": columns}))
    reason = "no header found" if header is None else "columns cannot be told: line longer than 1,000,000 characters"
    with pytest.raises(BadInputError, match=reason):
        list(open_reading(tmp_path / "a.csv", "a.csv", layout).chunks)


def test_the_first_line_may_be_too_long_where_another_tells_the_columns(tmp_path: Path, make: Any) -> None:
    (tmp_path / "a.csv").write_text("x" * 2_000_000 + "\nfine,low\n")
    layout = layout_of(make(source={"path": "landing", "header": False, "columns": {"text": 0, "label": 1}}))
    [chunk] = open_reading(tmp_path / "a.csv", "a.csv", layout).chunks
    assert (len(chunk.frame), len(chunk.malformed)) == (1, 1)


def test_a_file_is_understood_by_few_long_lines() -> None:
    taken = first_lines("x" * 900_000 for _ in range(200))
    assert len(taken) == 3


def test_long_records_of_a_parquet_file_are_quarantined_and_chunks_are_cut_by_characters(tmp_path: Path, make: Any) -> None:
    texts = [None, "y" * 2_000_000, *[f"{row} {'x' * 900_000}" for row in range(20)], "last"]
    pq.write_table(table(texts), tmp_path / "a.parquet")
    chunks = list(open_reading(tmp_path / "a.parquet", "a.parquet", layout_of(make())).chunks)
    assert sum(len(chunk.frame) for chunk in chunks) == 22
    [item] = [item for chunk in chunks for item in chunk.malformed]
    assert (item.row, len(item.raw)) == (2, 1_000_000)
    assert len(chunks) == 3
    assert list(chunks[-1].frame["text"])[-1] == "last"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
@pytest.mark.parametrize("written", [{}, {"use_dictionary": False}, {"data_page_version": "2.0", "compression": "zstd"}])
def test_text_is_read_however_parquet_stores_it(tmp_path: Path, make: Any, kind: Any, written: dict[str, Any]) -> None:
    texts = ["one", None, "drei äöü", "one"]
    labels = pa.array([1, 2, None, 4])
    column = pa.array(texts).cast(kind) if kind != pa.string_view() else pa.array(texts, kind)
    pq.write_table(pa.table({"text": column, "label": labels}), tmp_path / "a.parquet", row_group_size=3, **written)
    [chunk] = open_reading(tmp_path / "a.parquet", "a.parquet", layout_of(make())).chunks
    assert chunk.frame.astype(object).where(chunk.frame.notna(), None).to_numpy().tolist() == [
        ["one", "1"],
        [None, "2"],
        ["drei äöü", None],
        ["one", "4"],
    ]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.list_(pa.string()), pa.struct([("a", pa.string())])])
def test_columns_that_hold_no_text_are_refused(tmp_path: Path, make: Any, kind: Any) -> None:
    pq.write_table(pa.table({"text": pa.array([None], kind), "label": pa.array(["low"])}), tmp_path / "a.parquet")
    with pytest.raises(BadInputError, match=r"a\.parquet: column 'text' must hold text, got"):
        list(open_reading(tmp_path / "a.parquet", "a.parquet", layout_of(make())).chunks)


def test_a_damaged_parquet_file_is_bad_input_wherever_it_is_damaged(tmp_path: Path, make: Any) -> None:
    pq.write_table(table([f"text {row}" for row in range(50)]), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    path = tmp_path / "a.parquet"
    length = struct.unpack("<I", whole[-8:-4])[0]
    places = range(len(whole) - 8 - length, len(whole), 5)
    refused: list[str] = []
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            chunks = list(open_reading(path, "a.parquet", layout_of(make())).chunks)
        except BadInputError as error:
            refused.append(str(error))
        else:  # what the byte was for is of no matter here, such as a statistic or who wrote the file
            assert sum(len(chunk.frame) + len(chunk.malformed) for chunk in chunks) == 50
    assert len(places) / 4 < len(refused) < len(places)
    assert all(error.startswith("a.parquet: ") for error in refused)


@pytest.mark.parametrize("encoding", ["zlib", "rot13", "unicode_escape", "punycode", "idna", "no-such"])
def test_an_encoding_must_be_one_of_text(tmp_path: Path, make: Any, encoding: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,low\n")
    layout = layout_of(make(source={"path": "landing", "encoding": encoding}))
    with pytest.raises(BadInputError, match=f"source.encoding must name a text encoding such as cp1252, got '{encoding}'"):
        list(open_reading(tmp_path / "a.csv", "a.csv", layout).chunks)
