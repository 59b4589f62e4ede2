"""From all landed rows to the three splits. Landing more never moves nor removes a row that was kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from retune.config import Prompt
from retune.data.augment import augment
from retune.data.duplicates import jaccard, resolve, shingles
from retune.data.report import build_report
from retune.data.split import SPLITS, split_names
from retune.errors import BadInputError
from retune.text import clean, join_references

__all__ = ["PreprocessResult", "TokenLengths", "preprocess"]

TokenLengths = Callable[[list[str]], list[int]]


@dataclass(frozen=True)
class PreprocessResult:
    """Columns of each split: id (`OBJECT:ROW`), group (id of its earliest near row), inputs, target, slices.

    Generation: a training row has one reference; a validation or test row is one input with all of its references, one to a line.
    """

    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    report: dict[str, Any]
    """Plain JSON; see `retune.data.report.build_report`."""


def preprocess(parts: pd.DataFrame, prompt: Prompt, token_lengths: TokenLengths | None = None) -> PreprocessResult:
    """Cleans, takes duplicates together, splits, removes near-duplicates across splits, augments the training split.

    `parts`: every kept row of every part (`retune.data.parts.read_parts`). `token_lengths` counts the tokens of texts; without it the
    report has no token lengths. Raises BadInputError for a missing column.
    """
    rows = _prepare(parts, prompt)
    rows["split"] = split_names(rows["bucket"], prompt.preprocess.splits)
    unique, contradictions = _one_each(rows, prompt)
    resolution = resolve(unique["text_of_row"].tolist(), unique["split"].tolist(), prompt.preprocess.near_duplicate)
    ids = unique["id"].to_numpy(dtype=object)
    unique["group"] = pd.Series(ids[resolution.group], index=unique.index, dtype="str")
    removed = np.flatnonzero(resolution.blocker >= 0)
    near = [_near(unique, int(row), int(resolution.blocker[row])) for row in removed]
    kept = unique.drop(index=unique.index[removed])
    report = build_report(
        landed=rows,
        kept=kept,
        near_duplicates=near,
        contradictions=contradictions,
        classes=tuple(prompt.labels),
        target=prompt.target,
        slices=tuple(prompt.slices),
        tokens=token_lengths(kept["text_of_row"].tolist()) if token_lengths is not None and len(kept) else None,
        max_tokens=prompt.preprocess.max_tokens,
    )
    columns = list(dict.fromkeys(["id", "group", *prompt.inputs, prompt.target, *prompt.slices]))
    frames = {name: kept.loc[kept["split"] == name, columns].reset_index(drop=True) for name in SPLITS}
    if prompt.task == "generation":
        frames |= {name: _one_per_input(frames[name], prompt) for name in SPLITS if name != "train"}
    noise = prompt.preprocess.augmentation
    frames["train"] = augment(frames["train"], prompt.inputs, noise.copies, noise.seed)
    report["augmented"] = len(frames["train"]) - report["splits"]["train"]["rows"]
    return PreprocessResult(**frames, report=report)


def _prepare(parts: pd.DataFrame, prompt: Prompt) -> pd.DataFrame:
    """The landed rows in order, cleaned, with `id` and `text_of_row`, the inputs in one text."""
    wanted = list(dict.fromkeys(["object", "row", "bucket", *prompt.inputs, prompt.target, *prompt.slices]))
    if missing := [name for name in wanted if name not in parts.columns]:
        raise BadInputError(
            f"data/{prompt.name}: the parts have no column {', '.join(missing)} (they have {', '.join(map(str, parts.columns))}); "
            "a field was added to the prompt since these rows were ingested: ingest the landed objects anew"
        )
    rows = parts[wanted].sort_values(["object", "row"], ignore_index=True)
    free = list(prompt.inputs) if prompt.labels else [*prompt.inputs, prompt.target]
    for name in free:
        rows[name] = rows[name].map(clean).astype("str")
    rows["id"] = rows["object"].astype("str") + ":" + rows["row"].astype("str")
    rows["text_of_row"] = rows[prompt.inputs[0]]
    for name in prompt.inputs[1:]:
        rows["text_of_row"] = rows["text_of_row"] + "\n" + rows[name]
    return rows


def _one_each(rows: pd.DataFrame, prompt: Prompt) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """One row for each distinct input, and the contradictory labels.

    Classification: the earliest row's place with the latest row's label. Generation: an input may have several answers; each distinct
    one stays, in the split of the input's earliest row.
    """
    inputs = list(prompt.inputs)
    rows = rows.copy()
    same_input = rows.groupby(inputs, sort=False)
    rows["split"] = same_input["split"].transform("first")
    if not prompt.labels:
        return rows[~rows.duplicated([*inputs, prompt.target])].reset_index(drop=True), []
    before = same_input[prompt.target].shift()
    changed = before.notna() & (before != rows[prompt.target])
    contradictions = [
        {"id": str(one), "label": str(was), "later_id": str(other), "later_label": str(now)}
        for one, was, other, now in zip(
            same_input["id"].shift()[changed], before[changed], rows.loc[changed, "id"], rows.loc[changed, prompt.target], strict=True
        )
    ]
    rows[prompt.target] = same_input[prompt.target].transform("last")
    return rows[~rows.duplicated(inputs)].reset_index(drop=True), contradictions


def _one_per_input(rows: pd.DataFrame, prompt: Prompt) -> pd.DataFrame:
    """The earliest row of each input, with the references of all of its rows in the order in which they landed."""
    inputs = list(prompt.inputs)
    joined = rows.groupby(inputs, sort=False)[prompt.target].transform(join_references)
    return rows.assign(**{prompt.target: joined.astype("str")}).drop_duplicates(inputs, ignore_index=True)


def _near(unique: pd.DataFrame, removed: int, kept: int) -> dict[str, Any]:
    one, other = unique.iloc[removed], unique.iloc[kept]
    return {
        "id": one["id"],
        "split": one["split"],
        "near_id": other["id"],
        "near_split": other["split"],
        "similarity": round(jaccard(shingles(one["text_of_row"]), shingles(other["text_of_row"])), 4),
        "text": one["text_of_row"][:200],
        "near_text": other["text_of_row"][:200],
    }
