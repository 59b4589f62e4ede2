"""The predictions frame: what one release said about each test row.

| column | holds |
|---|---|
| `id` | row id, unique |
| `group` | group of near-duplicates that the row belongs to; never missing |
| `target` | reference: a label (classification) or texts, one to a line (generation) |
| `prediction` | a label or a text; anything outside of the labels, missing included, counts as wrong |
| `p_<label>` | classification only: probability of each label; a row's add up to 1 |
| `reference_nats`, `reference_tokens` | generation only: minus the log probability of all tokens of all references, and how many |
| `truncated` | generation only: whether the output was cut at the most tokens that may be generated |
| `output_nats`, `output_tokens` | generation on a decoder: as above, of the output under the base model alone |
| `relevance` | generation with an encoder: cosine of the embeddings of input and output |
| one per slice column | value of the slice; a missing one is shown as `(none)` |

Letters: N rows, K labels.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from retune.errors import BadInputError

__all__ = ["MISSING_SLICE", "check_pair", "check_predictions", "fit_labels", "label_codes", "probabilities", "rows_sha256", "slice_values"]

MISSING_SLICE = "(none)"
"""Shown for rows without a value in a slice column."""
SUM_TOLERANCE = 1e-3
"""How far a row's probabilities may add up to something other than 1: room for half precision, not for unnormalised scores."""


def check_predictions(predictions: pd.DataFrame, labels: Sequence[str], slices: Sequence[str] = ()) -> None:
    """Refuses a frame that is not a predictions frame; `labels` is empty for task: generation.

    Raises BadInputError naming the columns or rows that are wrong.
    """
    figures = [f"p_{label}" for label in labels] or ["reference_nats", "reference_tokens", "truncated"]
    wanted = ["id", "group", *slices, "target", "prediction", *figures]
    missing = [column for column in wanted if column not in predictions.columns]
    if missing:
        raise BadInputError(f"predictions must have the columns {', '.join(wanted)}; missing: {', '.join(missing)}")
    if predictions.empty:
        raise BadInputError("predictions must have at least 1 row, got 0: the test split is empty")
    for column in ("id", "group", "target"):
        absent = int(predictions[column].isna().sum())
        if absent:
            raise BadInputError(f"{column} must be set in every row of the predictions, got {absent} without")
    duplicated = predictions["id"].duplicated()
    if duplicated.any():
        example = predictions["id"][duplicated].iloc[0]
        raise BadInputError(f"id must be unique in the predictions, got {int(duplicated.sum())} repeated, such as {example!r}")
    if labels:
        unknown = label_codes(predictions["target"], labels) < 0
        if unknown.any():
            example = predictions["target"][unknown].iloc[0]
            raise BadInputError(f"target must be one of {', '.join(labels)}, got {example!r} ({int(unknown.sum())} such rows)")


def check_pair(candidate: pd.DataFrame, champion: pd.DataFrame, labels: Sequence[str]) -> None:
    """Refuses two frames that are not predictions of the same rows in the same order.

    Raises BadInputError naming the column and the first row that differs.
    """
    check_predictions(candidate, labels)
    check_predictions(champion, labels)
    if len(candidate) != len(champion):
        raise BadInputError(f"both releases must be evaluated on the same test rows, got {len(candidate)} and {len(champion)} rows")
    for column in ("id", "target", "group"):
        ours, theirs = candidate[column].astype(object).to_numpy(), champion[column].astype(object).to_numpy()
        differing = np.flatnonzero(ours != theirs)
        if len(differing):
            row = int(differing[0])
            raise BadInputError(
                f"both releases must be evaluated on the same test rows in the same order: {column} differs in {len(differing)} rows, "
                f"first in row {row}: {ours[row]!r} and {theirs[row]!r}"
            )


def label_codes(values: "pd.Series[str]", labels: Sequence[str]) -> npt.NDArray[np.int64]:
    """Position of each value in `labels`, -1 outside of them: [N]."""
    codes = pd.Index(list(labels), dtype=object).get_indexer(pd.Index(values.astype(object), dtype=object))
    return np.asarray(codes, dtype=np.int64)


def probabilities(predictions: pd.DataFrame, labels: Sequence[str]) -> npt.NDArray[np.float64]:
    """Probability of each label, in the order of `labels`, rows scaled to add up to exactly 1: [N, K].

    A row with a NaN or an infinity becomes NaN throughout, so that it shows in the metrics.
    Raises BadInputError where finite values are no probabilities.
    """
    raw = predictions[[f"p_{label}" for label in labels]].to_numpy(dtype=np.float64)
    raw = np.where(np.isfinite(raw).all(axis=1, keepdims=True), raw, np.nan)
    total = raw.sum(axis=1, keepdims=True)
    wrong = (raw < 0).any(axis=1) | (np.abs(total[:, 0] - 1) > SUM_TOLERANCE)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        got = ", ".join(f"{label}: {value:.4g}" for label, value in zip(labels, raw[row], strict=True))
        raise BadInputError(f"p_<label> must be probabilities that add up to 1, got {got} in row {predictions['id'].iloc[row]!r}")
    scaled: npt.NDArray[np.float64] = raw / total
    return scaled


def fit_labels(predictions: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """Predictions of a release that knew other labels, with a probability for each of today's: 0 for one that it did not know; what it gave
    to labels that are no more is shared out among the others as they stand."""
    known = [column for column in predictions.columns if column.startswith("p_")]
    wanted = [f"p_{label}" for label in labels]
    if known == wanted:
        return predictions
    fitted = predictions.drop(columns=known).assign(**{column: predictions.get(column, 0.0) for column in wanted})
    total = fitted[wanted].sum(axis=1, skipna=False)
    fitted[wanted] = fitted[wanted].div(total, axis=0).where(total != 0, 1 / len(wanted))
    return fitted


def rows_sha256(predictions: pd.DataFrame) -> str:
    """sha256 over the ordered (id, target) pairs, one line of JSON each: equal only for the same test rows in the same order."""
    digest = hashlib.sha256()
    for row, target in zip(predictions["id"], predictions["target"], strict=True):
        digest.update(json.dumps([str(row), str(target)], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def slice_values(predictions: pd.DataFrame, column: str) -> "pd.Series[str]":
    """The slice column as text, missing values as `(none)`: [N]."""
    values = predictions[column].astype(object)
    return values.where(values.notna(), MISSING_SLICE).map(str)
