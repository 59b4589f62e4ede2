"""From all landed rows to the three splits. Landing more never moves nor removes a row that was kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from retune.config import Prompt
from retune.data.augment import augment
from retune.data.columns import cleaned, in_one_text, texts_of
from retune.data.duplicates import jaccard, resolve, shingles
from retune.data.parts import in_order
from retune.data.report import build_report
from retune.data.split import SPLITS, split_names
from retune.errors import BadInputError
from retune.text import join_references

__all__ = ["PreprocessResult", "TokenLengths", "preprocess"]

TokenLengths = Callable[[list[str]], list[int]]
_TEXTS = 5_000


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
    del parts  # what is no longer needed goes as soon as it can: with a million rows each copy of the texts counts
    landed = rows["object"]
    unique, contradictions = _one_each(rows, prompt)
    del rows
    pa.default_memory_pool().release_unused()  # else what Arrow keeps of it stands beside what the search for near-duplicates takes
    texts = texts_of(in_one_text(unique, prompt.inputs))
    resolution = resolve(texts, texts_of(unique["split"]), prompt.preprocess.near_duplicate)
    del texts
    unique["group"] = unique["id"].take(resolution.group).array
    near = _near(unique, resolution.blocker, prompt.inputs)
    kept = unique[resolution.blocker < 0]
    del unique
    report = build_report(
        landed=landed,
        kept=kept,
        near_duplicates=near,
        contradictions=contradictions,
        inputs=prompt.inputs,
        classes=tuple(prompt.labels),
        target=prompt.target,
        slices=tuple(prompt.slices),
        tokens=_tokens(in_one_text(kept, prompt.inputs), token_lengths) if token_lengths is not None and len(kept) else None,
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
    """The landed rows in order, cleaned, with `split` and `id`."""
    wanted = list(dict.fromkeys(["object", "row", "bucket", *prompt.inputs, prompt.target, *prompt.slices]))
    free = list(prompt.inputs) if prompt.labels else [*prompt.inputs, prompt.target]
    if missing := [name for name in wanted if name not in parts.columns or (name in free and parts[name].isna().any())]:
        raise BadInputError(
            f"data/{prompt.name}: the parts have no column {', '.join(missing)} (they have {', '.join(map(str, parts.columns))}); "
            "a field was added to the prompt since these rows were ingested: ingest the landed objects anew"
        )
    rows = in_order(parts[wanted])
    for name in free:
        rows[name] = cleaned(rows[name])
    rows["split"] = split_names(rows["bucket"], prompt.preprocess.splits)
    rows["id"] = rows["object"].astype("str") + ":" + rows["row"].astype("str")
    return rows


def _one_each(rows: pd.DataFrame, prompt: Prompt) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """One row for each distinct input, and the contradictory labels.

    Classification: the earliest row's place with the latest row's label. Generation: an input may have several answers; each distinct
    one stays, in the split of the input's earliest row.
    """
    inputs = list(prompt.inputs)
    # Inputs are numbered in the order in which they first appear.
    number = rows.groupby(inputs, sort=False).ngroup().to_numpy()
    first = np.unique(number, return_index=True)[1]
    rows["split"] = rows["split"].take(first[number]).array
    if not prompt.labels:
        return rows[~rows.duplicated([*inputs, prompt.target])].reset_index(drop=True), []
    order = np.argsort(number, kind="stable")
    again = np.flatnonzero(number[order[1:]] == number[order[:-1]])
    later, before = order[again + 1], order[again]
    target = rows[prompt.target]
    changed = target.take(before).to_numpy() != target.take(later).to_numpy()
    in_order = np.argsort(later[changed])
    later, before = later[changed][in_order], before[changed][in_order]
    contradictions = [
        {"id": str(one), "label": str(was), "later_id": str(other), "later_label": str(now)}
        for one, was, other, now in zip(
            rows["id"].take(before), target.take(before), rows["id"].take(later), target.take(later), strict=True
        )
    ]
    last = order[np.append(np.flatnonzero(np.diff(number[order])), len(order) - 1)] if len(order) else order
    unique = rows.take(first)
    unique[prompt.target] = target.take(last).array
    return unique.reset_index(drop=True), contradictions


def _one_per_input(rows: pd.DataFrame, prompt: Prompt) -> pd.DataFrame:
    """The earliest row of each input, with the references of all of its rows in the order in which they landed."""
    inputs = list(prompt.inputs)
    joined = rows.groupby(inputs, sort=False)[prompt.target].transform(join_references)
    return rows.assign(**{prompt.target: joined.astype("str")}).drop_duplicates(inputs, ignore_index=True)


def _near(unique: pd.DataFrame, blocker: npt.NDArray[np.int64], inputs: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that leave, each beside the row that it is near to."""
    removed = np.flatnonzero(blocker >= 0)
    leaving, staying = (
        zip(rows["id"], rows["split"], in_one_text(rows, inputs), strict=True)
        for rows in (unique.take(places) for places in (removed, blocker[removed]))
    )
    return [
        {
            "id": one,
            "split": split,
            "near_id": other,
            "near_split": near_split,
            "similarity": round(jaccard(shingles(text), shingles(near_text)), 4),
            "text": text[:200],
            "near_text": near_text[:200],
        }
        for (one, split, text), (other, near_split, near_text) in zip(leaving, staying, strict=True)
    ]


def _tokens(column: "pd.Series[str]", token_lengths: TokenLengths) -> npt.NDArray[np.int64]:
    """Counted some texts at a time: the tokens themselves take many times the memory of the texts."""
    texts = texts_of(column)
    lengths = [np.zeros(0, dtype=np.int64)]
    while some := list(islice(texts, _TEXTS)):
        lengths.append(np.array(token_lengths(some), dtype=np.int64))
    return np.concatenate(lengths)
