"""A landed object becomes parts, and each of its rows is accounted for."""

import gzip
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retune.config import Prompt
from retune.data.ingest import ObjectResult, ingest_object, new_or_changed
from retune.data.landing import open_objects
from retune.data.parts import read_parts, split_bucket
from retune.errors import BadInputError, ConfigError, StageError

SLICED = {"slices": {"channel": ["email", "chat"], "region": None}}
DIRTY = """id,text,label,channel,region
1,"hello, world",High ,email,x
2,"multi
line ""q"" text",low,chat,
3,bad,P1,email,x
4,,low,email,x
5,a,b
6,say "no" now,low,email,x
7,"stray,low,email,x
8,mail me a@b.com,low,fax,x
9,"hello,   world",high,EMAIL,x
10,mine is a@b.org,,chat,x
"""


def ingest(
    folder: Path, prompt: Prompt, name: str, content: str | bytes, **options: Any
) -> tuple[ObjectResult, pd.DataFrame, pd.DataFrame]:
    """The result, the kept rows and the quarantined rows of one landed file."""
    landing = folder / "landing"
    landing.mkdir(exist_ok=True)
    (landing / name).write_bytes(content.encode() if isinstance(content, str) else content)
    item = next(item for item in open_objects("landing", root=folder).objects if item.key == name)
    result = ingest_object(prompt, item, 3, folder / "out", **options)
    kept = read_parts([folder / "out" / result.part] if result.part else [])
    bad = read_parts([folder / "out" / "quarantine" / result.quarantine] if result.quarantine else [])
    return result, kept, bad


def test_each_row_is_kept_quarantined_or_a_duplicate(tmp_path: Path, make: Any) -> None:
    result, kept, bad = ingest(tmp_path, make(**SLICED), "a.csv", DIRTY)
    assert (result.rows, result.kept, result.duplicates) == (10, 4, 1)
    assert result.quarantined == {"malformed": 1, "missing_label": 1, "missing_text": 1, "unknown_label": 1, "unknown_slice_value": 1}
    assert result.redacted == {"mail": 2, "phone": 0, "card": 0}
    assert kept["row"].tolist() == [1, 2, 6, 7]
    assert kept["text"].tolist() == ["hello, world", 'multi\nline "q" text', 'say "no" now', '"stray']
    assert kept["label"].tolist() == ["high", "low", "low", "low"]
    assert kept["region"].tolist() == ["x", "(none)", "x", "x"]
    assert kept["bucket"].tolist()[0] == split_bucket(["hello, world"])
    assert bad["row"].tolist() == [3, 4, 5, 8, 10]
    assert bad["reason"].tolist() == [
        "label must be one of low, high, got 'P1'",
        "text must not be empty",
        "3 field(s), expected 5",
        "channel must be one of email, chat, got 'fax'",
        "label must not be empty",
    ]
    assert json.loads(bad["record"][3])["text"] == "mail me <mail>"
    assert json.loads(bad["record"][2]) == {"raw": "5,a,b"}
    assert "label is matched without regard to case: 'High' as 'high'" in result.assumptions


def test_nothing_written_holds_what_was_redacted(tmp_path: Path, make: Any) -> None:
    ingest(tmp_path, make(**SLICED), "a.csv", DIRTY)
    frames = [pd.read_parquet(path) for path in (tmp_path / "out").rglob("*.parquet")]
    assert len(frames) == 2
    assert not any("@" in frame.to_json() for frame in frames)


def test_the_same_object_gives_the_same_bytes_under_a_name_of_their_hash(tmp_path: Path, make: Any) -> None:
    first, _, _ = ingest(tmp_path, make(**SLICED), "a.csv", DIRTY)
    again, _, _ = ingest(tmp_path, make(**SLICED), "a.csv", DIRTY)
    assert (first.part, first.quarantine) == (again.part, again.quarantine)
    digest = hashlib.sha256((tmp_path / "out" / str(first.part)).read_bytes()).hexdigest()
    assert first.part == f"{digest[:16]}.parquet"
    assert len(list((tmp_path / "out").rglob("*.*"))) == 2


@pytest.mark.parametrize("chunk_rows", [1, 2, 1000])
def test_chunks_change_no_row(tmp_path: Path, make: Any, chunk_rows: int) -> None:
    result, kept, _ = ingest(tmp_path, make(**SLICED), "a.csv", DIRTY, chunk_rows=chunk_rows)
    assert (result.rows, result.kept, result.duplicates, kept["row"].tolist()) == (10, 4, 1, [1, 2, 6, 7])


def test_the_bucket_is_frozen() -> None:
    digest = hashlib.blake2b(b"hello", key=b"split_v1", digest_size=8).digest()
    assert split_bucket(["hello"]) == int.from_bytes(digest, "big") % 10_000 == 7664


def test_the_bucket_comes_from_the_raw_text(tmp_path: Path, prompt: Prompt) -> None:
    _, kept, _ = ingest(tmp_path, prompt, "a.jsonl", '{"text": "  mail a@b.org ", "label": "low"}\n')
    assert kept["text"].tolist() == ["  mail <mail> "]
    assert kept["bucket"].tolist() == [split_bucket(["  mail a@b.org "])]


def test_json_lines_that_are_no_records_are_quarantined(tmp_path: Path, prompt: Prompt) -> None:
    lines = [
        '{"text": "good one", "label": "low"}',
        "{oops",
        '"text"',
        "",
        '{"text": ["x"], "label": "low"}',
        '{"label": "low"}',
        "[" * 9000,
    ]
    result, kept, bad = ingest(tmp_path, prompt, "a.jsonl", "\n".join(lines))
    assert (result.rows, kept["row"].tolist()) == (6, [1])
    assert bad["reason"].tolist()[0].startswith("not valid JSON: ")
    assert bad["reason"].tolist()[1:4] == ["must be a JSON object, got str", "text must be text, got a list", "text must not be empty"]


def test_every_format_gives_the_same_rows(tmp_path: Path, prompt: Prompt) -> None:
    frame = pd.DataFrame({"id": [1, 2], "text": ['it\'s "fine"', "two\nlines"], "label": ["low", "high"]})
    parquet = io.BytesIO()
    frame.to_parquet(parquet)
    csv = frame.to_csv(index=False)
    for name, content in {
        "a.csv": csv,
        "b.tsv": frame.to_csv(index=False, sep="\t"),
        "c.csv": frame.to_csv(index=False, sep=";"),
        "d.jsonl": frame.to_json(orient="records", lines=True),
        "e.parquet": parquet.getvalue(),
        "f.csv.gz": gzip.compress(csv.encode()),
        "g.csv": csv.encode("utf-16"),
        "h.csv": csv.encode("utf-8-sig"),
        "i.csv": csv.replace("\n", "\r\n").replace("two\r\n", "two\n"),
    }.items():
        result, kept, _ = ingest(tmp_path, prompt, name, content)
        assert result.quarantined == {}, name
        assert kept["text"].tolist() == frame["text"].tolist(), name
        assert kept["label"].tolist() == frame["label"].tolist(), name


def test_cp1252_is_found_and_said(tmp_path: Path, prompt: Prompt) -> None:
    result, kept, _ = ingest(tmp_path, prompt, "a.csv", "text,label\nDer Drucker läuft nicht – “jetzt”!,low\n".encode("cp1252"))
    assert kept["text"].tolist() == ["Der Drucker läuft nicht – “jetzt”!"]
    assert "encoding cp1252 (not valid UTF-8 at byte 24)" in result.assumptions


def test_one_bad_byte_in_utf8_costs_one_row(tmp_path: Path, prompt: Prompt) -> None:
    content = "text,label\nläuft,low\nschön,high\n".encode() + b"caf\xe9 ole,low\n"
    result, kept, _ = ingest(tmp_path, prompt, "a.csv", content)
    assert kept["text"].tolist() == ["läuft", "schön"]
    assert result.quarantined == {"malformed": 1}


def test_a_giant_line_is_quarantined_and_the_next_is_read(tmp_path: Path, prompt: Prompt) -> None:
    content = "text,label\n" + "x" * 3_000_000 + ",low\nfine,low\n" + "y" * 30_000 + ",low\n"
    result, kept, bad = ingest(tmp_path, prompt, "a.csv", content)
    assert (result.quarantined, kept["row"].tolist()) == ({"malformed": 1, "too_long": 1}, [2])
    assert bad["reason"].tolist() == [
        "line longer than 1,000,000 characters (source.max_record_characters)",
        "text must have at most 20000 character(s), got 30000",
    ]
    assert bad["record"].str.len().max() < 2_200


def test_a_missing_column_names_those_found_and_the_way_out(tmp_path: Path, prompt: Prompt) -> None:
    with pytest.raises(BadInputError, match=r"column 'label' \(for label\).*found: 'text', 'priority'.*source.columns: \{label: COLUMN\}"):
        ingest(tmp_path, prompt, "a.csv", "text,priority\nx,low\n")
    with pytest.raises(BadInputError, match=r"column 'text' .*found: 'body', 'label'"):
        ingest(tmp_path, prompt, "a.jsonl", '{"body": "x", "label": "low"}\n')
    with pytest.raises(BadInputError, match=r"no header found.*source.columns: \{text: 0, label: 1\}"):
        ingest(tmp_path, prompt, "b.csv", "some words,low\nother words,high\n")
    assert not list((tmp_path / "out").rglob("*.*"))


def test_columns_are_mapped_by_name_and_case_is_forgiven(tmp_path: Path, make: Any) -> None:
    prompt = make(source={"path": "landing", "columns": {"text": "Body", "label": "prio"}})
    result, kept, _ = ingest(tmp_path, prompt, "a.csv", "Prio;Body\nLOW;a, b\n")
    assert kept[["text", "label"]].values.tolist() == [["a, b", "low"]]
    assert "column 'Prio' is read as 'prio'" in result.assumptions


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_an_object_without_rows_writes_nothing(tmp_path: Path, prompt: Prompt, content: str) -> None:
    result, _, _ = ingest(tmp_path, prompt, "a.csv", content)
    assert (result.rows, result.part, result.quarantine) == (0, None, None)
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize(("name", "content"), [("a.parquet", b"no parquet"), ("a.csv.gz", gzip.compress(b"text,label\n" * 99)[:-9])])
def test_a_file_that_is_not_what_it_says_is_bad_input(tmp_path: Path, prompt: Prompt, name: str, content: bytes) -> None:
    with pytest.raises(BadInputError):
        ingest(tmp_path, prompt, name, content)


def test_an_object_replaced_while_it_is_read_is_an_error_that_a_retry_cures(tmp_path: Path, prompt: Prompt) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,low\n")
    item = open_objects(".", root=tmp_path).objects[0]
    with pytest.raises(StageError, match=r"a\.csv was replaced while it was read"), item.snapshot():
        path.write_text("text,label\nlonger,low\n")
    with pytest.raises(StageError):
        ingest_object(prompt, item, 0, tmp_path / "out")
    assert ingest_object(prompt, open_objects(".", root=tmp_path).objects[0], 0, tmp_path / "out").kept == 1


def test_hidden_partial_and_unknown_files_are_listed_not_read(tmp_path: Path) -> None:
    for name in ["b.csv", "a/x.jsonl", "c.csv.part", "d.tmp", ".e.csv", "_SUCCESS", "_a/f.csv", "g.pdf"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    landing = open_objects(str(tmp_path))
    assert [item.key for item in landing.objects] == ["a/x.jsonl", "b.csv"]
    assert [key for key, _ in landing.skipped] == [".e.csv", "_SUCCESS", "_a/f.csv", "c.csv.part", "d.tmp", "g.pdf"]
    with pytest.raises(ConfigError, match=r"source\.path must be a folder"):
        open_objects("nowhere", root=tmp_path)


MISLEADING = ["a\nb.csv", "a\x1b[2Jb.csv", "vsc.\u202etxt.csv", "a\u200bb.csv", "a\u2028b.csv", "b\ud800.csv"]


def test_names_that_mislead_are_skipped_and_listed_so_that_they_can_be_seen(tmp_path: Path) -> None:
    plain = ["grün 2026-05 (1).csv", "می\u200cخواهم.csv", "👩\u200d🔧.csv", "\U0001fae9\u0378.csv"]
    for name in [*MISLEADING[:-1], *plain, "a\u200db.csv", "\u200c.csv"]:
        (tmp_path / name).touch()
    (tmp_path / os.fsdecode(b"bytes\xff.csv")).touch()
    landing = open_objects(str(tmp_path))
    assert [item.key for item in landing.objects] == sorted(plain)
    assert sorted(key for key, _ in landing.skipped) == [
        "\\u{200c}.csv",
        "a\\u{1b}[2Jb.csv",
        "a\\u{200b}b.csv",
        "a\\u{200d}b.csv",
        "a\\u{2028}b.csv",
        "a\\u{a}b.csv",
        "bytes\\u{dcff}.csv",
        "vsc.\\u{202e}txt.csv",
    ]
    assert all("characters in its name" in reason for _, reason in landing.skipped)


def test_object_keys_that_are_no_plain_relative_paths_are_skipped() -> None:
    keys = ["in/t/../../etc/a.csv", "in/t//etc/a.csv", "in/t/x/./a.csv", *(f"in/t/{name}" for name in MISLEADING), "in/t/x/a.csv"]
    landing = open_objects("s3://bucket/in/t", s3=Bucket(dict.fromkeys(keys, b"")))
    assert [item.key for item in landing.objects] == ["x/a.csv"]
    reasons = dict(landing.skipped)
    assert all("no plain relative path" in reasons[key] for key in ["../../etc/a.csv", "/etc/a.csv", "x/./a.csv"])
    assert len(reasons) == len(keys) - 1


def test_links_out_of_a_landing_folder_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "landing"
    outside.mkdir()
    folder.mkdir()
    (outside / "secret.csv").write_text("text,label\nsecret,low\n")
    (folder / "real.csv").write_text("text,label\nx,low\n")
    (folder / "inside.csv").symlink_to("real.csv")
    (folder / "file.csv").symlink_to(outside / "secret.csv")
    (folder / "up.csv").symlink_to("../outside/secret.csv")
    (folder / "folder.csv").symlink_to(outside)
    (folder / "nothing.csv").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.csv")
    landing = open_objects("landing", root=tmp_path)
    assert [item.key for item in landing.objects] == ["inside.csv", "real.csv"]
    assert dict(landing.skipped) == {
        "file.csv": "a link out of the landing folder; land the file itself",
        "up.csv": "a link out of the landing folder; land the file itself",
        "folder.csv": "a link to no file; files of a linked folder are not read: land them themselves",
        "nothing.csv": "a link to no file; files of a linked folder are not read: land them themselves",
        "pipe.csv": "no plain file",
    }


def test_a_file_that_became_a_link_out_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    folder, secret, landed = tmp_path / "landing", tmp_path / "secret.csv", tmp_path / "landing" / "a.csv"
    folder.mkdir()
    for path in (secret, landed):
        path.write_text("text,label\nx,low\n")
        os.utime(path, (1, 1))
    [item] = open_objects("landing", root=tmp_path).objects
    landed.unlink()
    landed.symlink_to(secret)
    with pytest.raises(StageError, match=r"a\.csv was replaced .* now a link out of the landing folder"), item.snapshot():
        pytest.fail("it was opened")


def test_only_new_and_changed_objects_are_read(tmp_path: Path) -> None:
    for name in ["same", "touched", "changed", "new"]:
        (tmp_path / f"{name}.csv").write_text(name)
    objects = open_objects(str(tmp_path)).objects
    known = {
        item.key: {"fingerprint": item.fingerprint, "sha256": hashlib.sha256(item.key.removesuffix(".csv").encode()).hexdigest()}
        for item in objects
        if item.key != "new.csv"
    } | {"gone.csv": {"fingerprint": "1-1", "sha256": ""}}
    os.utime(tmp_path / "touched.csv", (1, 1))
    (tmp_path / "changed.csv").write_text("other")
    changes = new_or_changed(open_objects(str(tmp_path)).objects, known)
    assert [item.key for item in changes.read] == ["changed.csv", "new.csv"]
    assert changes.unchanged == ("same.csv", "touched.csv")
    assert changes.fingerprints == {"touched.csv": "1000000000-7"}
    assert changes.vanished == ("gone.csv",)


class Bucket:
    """The three calls of an S3 client that the landing zone makes."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def get_paginator(self, name: str) -> "Bucket":
        assert name == "list_objects_v2"
        return self

    def paginate(self, Bucket: str, Prefix: str) -> list[dict[str, Any]]:  # boto3's names
        found = [key for key in sorted(self.objects) if key.startswith(Prefix)]
        return [{"Contents": [{"Key": key, "Size": len(self.objects[key]), "ETag": self._etag(key)}]} for key in found] or [{}]

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # boto3's names
        body = io.BytesIO(self.objects[Key])
        body.iter_chunks = lambda size: iter(lambda: body.read(size), b"")  # type: ignore[attr-defined]
        return {"ETag": self._etag(Key), "ContentLength": len(self.objects[Key]), "Body": body}

    def _etag(self, key: str) -> str:
        return f'"{hashlib.md5(self.objects[key]).hexdigest()}"'


def test_a_bucket_is_read_like_a_folder(tmp_path: Path, prompt: Prompt) -> None:
    client = Bucket({"in/t/": b"", "in/t/a.csv": b"text,label\nx y z,low\n", "in/t/b.tmp": b"", "in/tt/c.csv": b""})
    landing = open_objects("s3://bucket/in/t", s3=client)
    assert [item.key for item in landing.objects] == ["a.csv"]
    assert [key for key, _ in landing.skipped] == ["b.tmp"]
    assert ingest_object(prompt, landing.objects[0], 0, tmp_path).kept == 1
    client.objects["in/t/a.csv"] = b"text,label\nother,low\n"
    with pytest.raises(StageError, match="was replaced"):
        ingest_object(prompt, landing.objects[0], 0, tmp_path)


def test_free_text_targets_are_kept_and_redacted(tmp_path: Path, make: Any) -> None:
    prompt = make(task="generation", labels={}, target="ref", template="{mr} ->", source={"path": "landing", "max_characters": 20})
    result, kept, _ = ingest(tmp_path, prompt, "a.csv", f"mr,ref\nx,ask a@b.org\nx,\ny,{'z' * 21}\n")
    assert kept["ref"].tolist() == ["ask <mail>"]
    assert result.quarantined == {"missing_label": 1, "too_long": 1}
