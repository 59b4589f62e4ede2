"""Drafts a prompt file from a sample of somebody's data: which column is the text, which the target, what task that makes.

Guesses are told with their reason, so that a person can overrule them. Nothing here is written to disk.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from retune.data.dialect import assemble, sniff
from retune.data.encoding import find_encoding, first_lines, open_bytes, read_lines
from retune.data.landing import format_of
from retune.data.read import Layout, open_reading
from retune.errors import BadInputError
from retune.policy import BaseModelRef
from retune.text import normalise

__all__ = ["Draft", "Sample", "draft", "prompt_yaml", "read_sample"]

SAMPLE_CHUNKS = 2
"""Chunks of 50,000 rows that are read: labels that only stand further down are not seen."""
MAX_LABELS = 60
MAX_LABEL_CHARACTERS = 40
MAX_SLICE_VALUES = 12
TEXT_NAMES = ("text", "body", "message", "content", "description", "question", "utterance", "sentence", "input", "source", "mr")
TARGET_NAMES = ("label", "target", "class", "category", "intent", "domain", "priority", "summary", "answer", "output", "reference", "ref")
RESERVED = frozenset({"id", "group", "text", "label", "target", "prediction", "split", "object", "row", "bucket"})
"""Names that a slice may not have: the pipeline's own columns."""

Column = str | int


@dataclass(frozen=True)
class Sample:
    columns: tuple[Column, ...]
    """Names, or positions from 0 in a file without a header."""
    frame: pd.DataFrame
    """One `str` column for each, named by its text; missing values as NaN."""
    malformed: int
    """Records that could not be read."""
    header: bool


@dataclass(frozen=True)
class Draft:
    text: Column
    text_reason: str
    target: Column
    target_reason: str
    task: Literal["classification", "generation"]
    task_reason: str
    labels: tuple[str, ...]
    """By frequency; empty for task: generation."""
    slices: Mapping[Column, tuple[str, ...]]
    """Column -> values seen."""
    answer_characters: int
    """Length of the longest target."""


def read_sample(path: Path) -> Sample:
    """The first 100,000 rows of a CSV, TSV, JSONL or Parquet file, the first three also as .gz.

    Raises BadInputError for another suffix, a file without rows or with fewer than two columns.
    """
    if not path.is_file():
        raise BadInputError(f"no such file: {path}")
    form = format_of(path.name)
    if form is None:
        raise BadInputError(f"{path.name}: must end in .csv, .tsv, .jsonl (each also .gz) or .parquet")
    columns = _columns(path, form)
    header = all(isinstance(column, str) for column in columns)
    layout = Layout(columns={str(column): column for column in columns}, target="", labels=(), header=header)
    chunks = list(islice(open_reading(path, path.name, layout).chunks, SAMPLE_CHUNKS)) if columns else []
    frame = pd.concat([chunk.frame for chunk in chunks]) if chunks else pd.DataFrame()
    if len(columns) < 2 or frame.empty:
        found = ", ".join(map(repr, columns)) or "none"
        raise BadInputError(f"{path.name}: must have rows with a text and a target column, got {len(frame)} rows, columns: {found}")
    return Sample(columns, frame, sum(len(chunk.malformed) for chunk in chunks), header)


def _columns(path: Path, form: str) -> tuple[Column, ...]:
    if form == "parquet":
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(f"{path.name}: not a readable Parquet file: {error}") from None
        return tuple(field.name for field in schema if not pa.types.is_nested(field.type) and not pa.types.is_binary(field.type))
    suffix, _, gz = form.partition(".")
    with open_bytes(path, bool(gz)) as stream:
        lines = first_lines(read_lines(stream, find_encoding(path, bool(gz), None).name))
    if suffix == "jsonl":
        return _fields([line for line in lines if line.strip()])
    dialect, _ = sniff(lines, suffix=suffix, columns={}, target="", labels=(), delimiter=None, quote=None, header=True)
    records = [record.fields for record in assemble(lines, dialect.delimiter, dialect.quote, None)]
    return (dialect.names or ()) if _is_header(records) else tuple(range(dialect.width))


def _fields(lines: Sequence[str]) -> tuple[Column, ...]:
    """Fields of the JSON objects that hold text or numbers; a line that is none is left to the reader."""
    found: dict[str, None] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.update({name: None for name, value in record.items() if not isinstance(value, dict | list)})
    return tuple(found)


def _is_header(records: Sequence[Sequence[str]]) -> bool:
    """Whether the first record is short distinct words, none of which stands in its column again."""
    first = [field.strip() for field in records[0]] if records else []
    if len(set(first)) < len(first) or not all(0 < len(name) <= MAX_LABEL_CHARACTERS and not name[0].isdigit() for name in first):
        return False
    return not any(name == fields[place].strip() for fields in records[1:] if len(fields) == len(first) for place, name in enumerate(first))


def draft(sample: Sample, text: str | None = None, target: str | None = None) -> Draft:
    """Guesses what `text` and `target`, the names or positions of columns, do not say.

    Raises BadInputError for a column that is not there, and where no column is left for the target.
    """
    values = {column: sample.frame[str(column)].dropna().map(normalise) for column in sample.columns}
    values = {column: series[series != ""] for column, series in values.items()}
    given = [_named(name, option, sample) for name, option in ((text, "--text"), (target, "--target")) if name is not None]
    free = [column for column in sample.columns if column not in given and len(values[column])]
    length = {column: float(values[column].str.len().mean()) for column in free}
    if text is not None:
        of_text, text_reason = _named(text, "--text", sample), "you named it"
    else:
        of_text, text_reason = _by_name(free, TEXT_NAMES) or _longest(free, length)
    free = [column for column in free if column != of_text]
    if target is not None:
        of_target, target_reason = _named(target, "--target", sample), "you named it"
    else:
        few = [column for column in free if _few(values[column], MAX_LABELS)]
        last = (few[-1], "the last column with few distinct values") if few else None
        of_target, target_reason = _by_name(free, TARGET_NAMES) or last or _longest(free, length)
    if of_text == of_target:
        raise BadInputError(f"--text and --target must be two columns, got {of_text!r} twice")
    answers = values[of_target]
    if answers.empty:
        raise BadInputError(f"column {of_target!r} must have values to be the target, got none; name another by --target")
    labels = _labels(answers) if _few(answers, MAX_LABELS) else ()
    distinct = f"{answers.nunique():,} distinct values in {len(answers):,} rows, the longest of {int(answers.str.len().max())} characters"
    slices = {
        column: tuple(sorted(values[column].unique())) for column in free if column != of_target and _few(values[column], MAX_SLICE_VALUES)
    }
    return Draft(
        text=of_text,
        text_reason=text_reason,
        target=of_target,
        target_reason=target_reason,
        task="classification" if labels else "generation",
        task_reason=distinct,
        labels=labels,
        slices=slices,
        answer_characters=int(answers.str.len().max()),
    )


def _named(name: str, option: str, sample: Sample) -> Column:
    found = next((column for column in sample.columns if str(column).casefold() == name.casefold()), None)
    if found is None:
        raise BadInputError(f"{option} must be one of the columns {', '.join(map(str, sample.columns))}, got {name!r}")
    return found


def _by_name(columns: Sequence[Column], names: Sequence[str]) -> tuple[Column, str] | None:
    lowered = {str(column).casefold(): column for column in columns}
    return next(((lowered[name], "its name") for name in names if name in lowered), None)


def _longest(columns: Sequence[Column], length: Mapping[Column, float]) -> tuple[Column, str]:
    if not columns:
        raise BadInputError("no column with values is left to be the target; name it by --target")
    found = max(columns, key=lambda column: length[column])
    return found, f"its values are the longest, {length[found]:.0f} characters on average"


def _few(values: "pd.Series[str]", most: int) -> bool:
    """Whether the values are few, short, and each there several times on average."""
    distinct = values.str.casefold().nunique()
    return 2 <= distinct <= most and len(values) >= 4 * distinct and int(values.str.len().max()) <= MAX_LABEL_CHARACTERS


def _labels(values: "pd.Series[str]") -> tuple[str, ...]:
    """Distinct values by frequency, each in its commonest spelling."""
    found: dict[str, str] = {}
    for value in values.value_counts().index:
        found.setdefault(value.casefold(), value)
    return tuple(found.values())


def prompt_yaml(name: str, sample: Sample, drafted: Draft, base_model: BaseModelRef, file: str) -> str:
    """The prompt file's text, with comments that say what each part is."""
    target = "label" if drafted.labels else "target"
    slices = {_identifier(column): column for column in drafted.slices}
    columns = {"text": drafted.text, target: drafted.target, **slices}
    seen = {field: ", ".join(drafted.slices[column]) for field, column in slices.items()}
    answers = "".join(f"\n  {_scalar(label)}: {_scalar(_words(label))}" for label in drafted.labels)
    tokens = min(256, max(16, -(-drafted.answer_characters // 16) * 8))
    template = f"{_title(drafted.text, 'Text')}: {{text}}\n{_title(drafted.target, 'Answer')}:"
    labels = ["# Label -> its words as the model writes them. Rows with another label are quarantined.", f"labels:{answers}"]
    generation = ["# Most tokens of an answer; temperature 0 takes the likeliest.", f"generation: {{max_new_tokens: {tokens}}}"]
    parts = [
        f"# Drafted from {' '.join(file.split())}. src/retune/config.py says what each field means and which others there are.",
        f"name: {name}",
        'description: ""  # what it is for; shown in Airflow and MLflow',
        'owner: ""',
        f"task: {drafted.task}  # {drafted.task_reason}",
        "# The frozen language model. The one in examples/ only knows support tickets: name your own for anything but a first try.",
        "base_model:" + "".join(f"\n  {key}: {_scalar(value)}" for key, value in base_model.model_dump(exclude_none=True).items()),
        "# Where new files land, and which of their columns are which field.",
        f"source:\n  path: .retune/landing/{name}" + ("" if sample.header else "\n  header: false") + "\n  columns:",
        *(f"    {field}: {_scalar(column)}" for field, column in columns.items()),
        "# When it is retrained: a cron expression (UTC), new data, or both.",
        "schedule: {on_new_data: true, min_new_rows: 0}",
        "# What the model reads before its answer.",
        f"template: {_scalar(template)}",
        f"target: {target}",
        *(labels if drafted.labels else []),
        *(["# Columns by whose values the figures are also reported (null: any value).", "slices:"] if slices else []),
        *(f"  {field}: null  # seen: {values}" for field, values in seen.items()),
        "# Tokens of a text that are read, and the shares of the rows; a row never changes its side.",
        "preprocess: {max_tokens: 256, splits: {train: 0.6, validation: 0.15, test: 0.25}}",
        *([] if drafted.labels else generation),
        "# The soft prompt: its length, and how it is tuned. `trials` would list variations to choose from.",
        "tune: {num_virtual_tokens: 20, init: sampled_vocabulary, learning_rate: 0.03, epochs: 8, batch_size: 8, validate_every: 50}",
        "# The gate: a candidate must be measurably better in this metric, by min_gain at least.",
        f"promote: {{metric: {'macro_f1' if drafted.labels else 'rougeL'}, min_gain: 0.01, confidence: 0.95}}",
    ]
    return "\n".join(parts) + "\n"


def _scalar(value: Column) -> str:
    """A JSON scalar is one of YAML, too."""
    return json.dumps(value, ensure_ascii=False)


def _identifier(column: Column) -> str:
    name = re.sub(r"\W", "_", f"column_{column}" if isinstance(column, int) else column.strip().lower())
    return f"{name}_" if name in RESERVED else name


def _words(label: str) -> str:
    return " " + label.replace("_", " ")


def _title(column: Column, otherwise: str) -> str:
    """A column's name as the heading of what follows; braces would be fields."""
    return otherwise if isinstance(column, int) else re.sub(r"[{}_\s]+", " ", column).strip().capitalize() or otherwise
