"""Labelled sets beside the test split: files that a prompt file names, with their hash (out-of-domain rows, past failures)."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from retune.config import Prompt
from retune.errors import BadInputError, IntegrityError
from retune.policy import LabelledSet

__all__ = ["read_labelled"]

_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, dtype="str", keep_default_na=False),
    ".tsv": lambda path: pd.read_csv(path, dtype="str", keep_default_na=False, sep="\t"),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False, convert_dates=False),
    ".parquet": pd.read_parquet,
}


def read_labelled(name: str, found: LabelledSet, prompt: Prompt, project: Path) -> pd.DataFrame:
    """The set's rows: `id` (`NAME:ROW`, from 1), `group` (each row its own), the input fields, the target and the slice columns it has.

    Raises IntegrityError if the file is not the one that the prompt file names, BadInputError for a format, column or label that is not
    known.
    """
    path, where = project / found.path, f"evaluate.test_sets.{name} ({found.path})"
    if not path.is_file():
        raise BadInputError(f"{where}: no such file in {project}; the path is relative to the project")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != found.sha256:
        raise IntegrityError(
            f"{where}: its sha256 is {digest}, the prompt file names {found.sha256}; if the change is meant, write the new one there"
        )
    if path.suffix not in _READERS:
        raise BadInputError(f"{where}: must be one of {', '.join(_READERS)}, got {path.suffix!r}")
    rows = _READERS[path.suffix](path)
    wanted = [*prompt.inputs, prompt.target]
    if missing := [column for column in wanted if column not in rows.columns]:
        raise BadInputError(f"{where}: no column {', '.join(missing)}; it has {', '.join(map(str, rows.columns))}")
    rows = rows[[*wanted, *(column for column in prompt.slices if column in rows.columns and column not in wanted)]].copy()
    for column in wanted:
        empty = rows[column].isna() | (rows[column].astype("str").str.strip() == "")
        if empty.any():
            raise BadInputError(f"{where}: {column} must be set in every row, got none in row {int(empty.to_numpy().argmax()) + 1}")
        rows[column] = rows[column].astype("str")
    unknown = ~rows[prompt.target].isin(list(prompt.labels)) if prompt.labels else pd.Series(False, index=rows.index)
    if unknown.any():
        at = int(unknown.to_numpy().argmax())
        got = rows[prompt.target].iloc[at]
        raise BadInputError(f"{where}: {prompt.target} must be one of {', '.join(prompt.labels)}, got {got!r} in row {at + 1}")
    if rows.empty:
        raise BadInputError(f"{where}: holds no rows")
    rows["id"] = rows["group"] = [f"{name}:{number}" for number in range(1, len(rows) + 1)]
    return rows.reset_index(drop=True)
