"""What `retune new` guesses from a sample, and that the file it writes is a prompt file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from retune.config import Prompt, load_prompt
from retune.draft import Draft, draft, prompt_yaml, read_sample
from retune.errors import BadInputError
from retune.policy import BaseModelRef

BASE = BaseModelRef(path="models/base", sha256="a" * 64)
INTENTS = ["book a flight", "card lost", "set an alarm"]


def requests(rows: int = 40) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "request_id": [f"R{n}" for n in range(rows)],
            "Channel": [("app", "web")[n % 2] for n in range(rows)],
            "said": [f"please do thing number {n} for me" for n in range(rows)],
            "what they wanted": [INTENTS[n % 3] for n in range(rows)],
        }
    )


def guess(path: Path, **options: Any) -> tuple[Draft, Prompt]:
    """The draft, and the prompt file that it makes, loaded."""
    sample = read_sample(path)
    drafted = draft(sample, **options)
    file = path.parent / "mine.yaml"
    file.write_text(prompt_yaml("mine", sample, drafted, BASE, path.name), "utf-8")
    return drafted, load_prompt(file)


def write(folder: Path, name: str, frame: pd.DataFrame, **options: Any) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith(".jsonl"):
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        path.write_text(frame.to_csv(index=False, **options), "utf-8")
    return path


@pytest.mark.parametrize(("name", "options"), [("a.csv", {"sep": ";"}), ("a.tsv", {"sep": "\t"}), ("a.jsonl", {}), ("a.parquet", {})])
def test_few_short_targets_make_a_classification(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    drafted, prompt = guess(write(tmp_path, name, requests(), **options))
    assert (drafted.text, drafted.text_reason) == ("said", "its values are the longest, 32 characters on average")
    assert (drafted.target, drafted.target_reason) == ("what they wanted", "the last column with few distinct values")
    assert drafted.task_reason == "3 distinct values in 40 rows, the longest of 13 characters"
    assert prompt.labels == {intent: f" {intent}" for intent in INTENTS}
    assert prompt.slices == {"channel": None}
    assert prompt.source.columns == {"text": "said", "label": "what they wanted", "channel": "Channel"}
    assert (prompt.template, prompt.source.path, prompt.promote.metric) == (
        "Said: {text}\nWhat they wanted:",
        ".retune/landing/mine",
        "macro_f1",
    )


def test_long_targets_make_a_generation_with_room_for_the_longest(tmp_path: Path) -> None:
    frame = pd.DataFrame({"mr": [f"name[{n}], food[{n}]" for n in range(9)], "ref": [f"{n} serves food. " * 9 for n in range(9)]})
    drafted, prompt = guess(write(tmp_path, "a.csv", frame))
    assert (drafted.text_reason, drafted.target_reason) == ("its name", "its name")
    assert (prompt.task, prompt.labels, prompt.promote.metric) == ("generation", {}, "rougeL")
    assert prompt.generation.max_new_tokens >= drafted.answer_characters / 2


def test_what_a_person_names_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", requests())
    drafted, _ = guess(path, text="WHAT THEY WANTED", target="channel")
    assert (drafted.text, drafted.target, drafted.labels) == ("what they wanted", "Channel", ("app", "web"))
    assert (drafted.text_reason, drafted.target_reason) == ("you named it", "you named it")
    with pytest.raises(BadInputError, match=r"--target must be one of the columns request_id, .*, got 'label'"):
        guess(path, target="label")
    with pytest.raises(BadInputError, match="two columns, got 'said' twice"):
        guess(path, text="said", target="said")


def test_a_file_without_header_is_read_by_position(tmp_path: Path) -> None:
    lines = [f"low,my order {n} is late" if n % 2 else f"high,my order {n} is on fire" for n in range(20)]
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    drafted, prompt = guess(path)
    assert (drafted.text, drafted.target, set(drafted.labels)) == (1, 0, {"low", "high"})
    assert (prompt.source.header, prompt.source.columns) == (False, {"text": 1, "label": 0})
    assert prompt.template == "Text: {text}\nAnswer:"


def test_labels_keep_their_commonest_spelling_and_names_of_the_pipeline_are_not_slices(tmp_path: Path) -> None:
    frame = requests().assign(group=["x", "y"] * 20)
    frame["what they wanted"] = ["No", "no", "no", "yes: {1}"] * 10
    drafted, prompt = guess(write(tmp_path, "a.csv", frame), target="what they wanted")
    assert drafted.labels == ("no", "yes: {1}")
    assert prompt.slices == {"channel": None, "group_": None}


def test_nested_fields_and_records_that_are_none_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"body": f"text {n}", "tags": ["a"], "label": "ab"[n % 2]}) for n in range(10)]
    path.write_text("\n".join([*rows, "{broken"]))
    sample = read_sample(path)
    assert (sample.columns, len(sample.frame), sample.malformed) == (("body", "label"), 10, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", "x", r"must end in .csv, .tsv, .jsonl"),
        ("a.csv", "text\nhello\n", "must have rows with a text and a target column, got"),
        ("a.csv", "", "got 0 rows, columns: none"),
        ("a.csv", "text,label\n", "got 0 rows, columns: 'text', 'label'"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.csv", "text,label\nhello,\nbye,\n", "no column with values is left"),
    ],
)
def test_a_file_that_is_no_sample_says_why(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match=message):
        draft(read_sample(tmp_path / name))
    with pytest.raises(BadInputError, match="no such file"):
        read_sample(tmp_path / "none.csv")


def test_every_part_of_the_file_is_explained(tmp_path: Path) -> None:
    guess(write(tmp_path, "a.csv", requests()))
    text = (tmp_path / "mine.yaml").read_text("utf-8")
    for field in yaml.safe_load(text):
        line = next(number for number, line in enumerate(text.splitlines()) if line.startswith(f"{field}:"))
        beside = text.splitlines()[line - 1 : line + 1]
        assert field in ("name", "owner", "target") or any("# " in words for words in beside), field
