"""Delimited files as people export them, and real text in two shapes."""

import json
from pathlib import Path
from typing import Any

import pytest

from retune.data.dialect import assemble, split_fields
from retune.data.ingest import ingest_object, layout_of
from retune.data.landing import open_objects
from retune.data.parts import read_parts
from retune.data.preprocess import preprocess
from retune.data.read import open_reading


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('a,"b, c",d', ["a", "b, c", "d"]),
        ('a,"say ""x""",', ["a", 'say "x"', ""]),
        ('5" screen,say "no"', ['5" screen', 'say "no"']),
        ('"hello" she said,x', ['"hello" she said', "x"]),
        ('a, "b, c" ,d', ["a", "b, c", "d"]),
        ('""', [""]),
    ],
)
def test_a_quote_counts_only_around_a_whole_field(text: str, fields: list[str]) -> None:
    assert split_fields(text, ",", '"') == (fields, "whole")


def test_an_open_quote_takes_in_lines_only_if_it_closes_properly() -> None:
    lines = ['"two', 'lines",low', '"stray,low', 'he said "yes",low', "last,low"]
    records = list(assemble(lines, ",", '"', 2))
    assert [record.fields for record in records] == [["two\nlines", "low"], ['"stray', "low"], ['he said "yes"', "low"], ["last", "low"]]
    assert not any(record.problem for record in records)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.tsv", "it's \"fine\"\tlow\n'quoted' start\thigh\n\"half\tlow\n", ['it\'s "fine"', "'quoted' start", '"half']),
        ("b.csv", "'one, two','low'\n'three','high'\n'four','low'\n", ["one, two", "three", "four"]),
        ("c.csv", "one, two|low\nthree|high\n", ["one, two", "three"]),
        ("d.tsv", "text\tlabel\nx\tlow\n", ["x"]),
        ("e.csv", "Ticket,Urgency\nx,low\ny,high\n", ["x", "y"]),
    ],
)
def test_files_are_read_by_position(tmp_path: Path, make: Any, name: str, content: str, texts: list[str]) -> None:
    (tmp_path / name).write_text(content)
    prompt = make(source={"path": ".", "columns": {"text": 0, "label": 1}})
    [chunk] = open_reading(tmp_path / name, name, layout_of(prompt)).chunks
    assert chunk.frame["text"].tolist() == texts
    assert set(chunk.frame["label"]) <= {"low", "high"}
    assert chunk.malformed == ()


def test_clinc150_reads_alike_as_json_lines_and_as_bare_tsv(tmp_path: Path, make: Any, shared_data: Path) -> None:
    splits = json.loads((shared_data / "clinc150" / "data_full.json").read_text())
    rows = [(text, label) for split in ("train", "val", "oos_test") for text, label in splits[split]]
    assert len(rows) == 15_000 + 3_000 + 1_000
    labels = {label: f" {label}" for _, label in rows}
    for folder in ("json", "tsv"):
        (tmp_path / folder).mkdir()
    with (tmp_path / "json" / "a.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    with (tmp_path / "tsv" / "a.tsv").open("w") as stream:
        stream.writelines(f"{text}\t{label}\n" for text, label in rows)
    frames = []
    for folder, columns in {"json": {}, "tsv": {"text": 0, "label": 1}}.items():
        prompt = make(labels=labels, source={"path": folder, "columns": columns})
        [item] = open_objects(folder, root=tmp_path).objects
        result = ingest_object(prompt, item, 0, tmp_path / "out")
        assert (result.rows, result.quarantined) == (19_000, {})
        frames.append(read_parts([tmp_path / "out" / str(result.part)]))
    assert frames[0].equals(frames[1])
    assert sum("'" in text for text in frames[0]["text"]) > 1_000
    report = preprocess(frames[0], prompt).report
    assert report["rows"] == report["kept"] + report["duplicates"] + report["near_duplicates"]


def test_e2e_reads_with_all_its_references(tmp_path: Path, make: Any, shared_data: Path) -> None:
    prompt = make(task="generation", labels={}, template="{mr} =", target="ref", source={"path": "."})
    [item] = [item for item in open_objects(str(shared_data / "e2e_nlg")).objects if item.key.startswith("devel")]
    result = ingest_object(prompt, item, 0, tmp_path)
    assert (result.rows, result.quarantined) == (4_299, {})
    frame = read_parts([tmp_path / str(result.part)])
    assert frame["mr"].nunique() == 1_484
    kept = preprocess(frame, prompt)
    owners = [set(getattr(kept, split)["mr"]) for split in ("train", "validation", "test")]
    assert not owners[0] & owners[1]
    assert not owners[0] & owners[2]
    assert not owners[1] & owners[2]
