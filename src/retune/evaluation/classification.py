"""Metrics of task: classification, each a function of sums over rows.

Macro averages are over the labels that occur among the references of the rows at hand, so that a slice in which a label never occurs can
still reach 1. Predictions outside of the labels are wrong: they lower the recall of the true label and are no label's false positive.

Letters: N rows, R resamples (1 for a whole split), S sums, K labels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from retune.evaluation.predictions import label_codes, probabilities
from retune.evaluation.sums import Floats, mean, value_and_one

__all__ = ["BINS", "CLASSIFICATION", "bin_sums", "right_rows", "row_log_loss"]

BINS = 10
"""Of equal width, for the calibration error and the reliability diagram."""


def right_rows(predictions: pd.DataFrame, labels: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether each prediction is the reference: [N]."""
    return np.equal(label_codes(predictions["target"], labels), label_codes(predictions["prediction"], labels))


def row_log_loss(predictions: pd.DataFrame, labels: Sequence[str]) -> Floats:
    """Minus the log probability of the reference, in nats, at most about 36: a probability of 0 counts as 2e-16. [N]"""
    given = probabilities(predictions, labels)[np.arange(len(predictions)), label_codes(predictions["target"], labels)]
    eps = np.finfo(np.float64).eps
    losses: Floats = -np.log(np.clip(given, eps, 1 - eps))
    return losses


def bin_sums(predictions: pd.DataFrame, labels: Sequence[str]) -> Floats:
    """Rows, their confidence and those answered rightly, in each of BINS bins of confidence: [N, 3 * BINS].

    Confidence is the largest probability; a row without one, NaN, makes its sums NaN.
    """
    given = probabilities(predictions, labels)
    top = given.max(axis=1)
    bins = np.clip(np.nan_to_num(top * BINS).astype(np.int64), 0, BINS - 1)
    right = label_codes(predictions["target"], labels) == given.argmax(axis=1)
    inside = bins[:, None] == np.arange(BINS)
    return np.concatenate([inside * 1.0, np.where(inside, top[:, None], 0), inside * right[:, None]], axis=1)


def _calibration_error(sums: Floats) -> Floats:
    """Expected calibration error (Naeini et al., AAAI 2015): mean distance of confidence and accuracy over the bins, each weighing as much
    as it has rows. [R, 3 * BINS] -> [R]"""
    rows, confidence, right = np.split(sums, 3, axis=1)
    return np.asarray(np.abs(confidence - right).sum(axis=1) / rows.sum(axis=1), dtype=np.float64)


def _label_counts(predictions: pd.DataFrame, labels: Sequence[str]) -> Floats:
    """Per row and label: rightly predicted, predicted, referenced: [N, 3K]."""
    every = np.arange(len(labels))
    target = label_codes(predictions["target"], labels)[:, None] == every
    prediction = label_codes(predictions["prediction"], labels)[:, None] == every
    return np.concatenate([target & prediction, prediction, target], axis=1).astype(np.float64)


def _average(figure: Callable[[Floats, Floats, Floats], Floats], weighted: bool) -> Callable[[Floats], Floats]:
    """From counts, [R, 3K] to [R]: the mean of a figure over the labels that are referenced, or weighted by how often they are."""

    def total(counts: Floats) -> Floats:
        right, predicted, referenced = np.split(counts, 3, axis=1)
        weight = referenced if weighted else referenced > 0
        return np.asarray((figure(right, predicted, referenced) * weight).sum(axis=1) / weight.sum(axis=1), dtype=np.float64)

    return total


def _ratio(part: Floats, whole: Floats) -> Floats:
    """0 where undefined."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


_FIGURES: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "f1": lambda right, predicted, referenced: _ratio(2 * right, predicted + referenced),
    "precision": lambda right, predicted, referenced: _ratio(right, predicted),  # noqa: ARG005
    "recall": lambda right, predicted, referenced: _ratio(right, referenced),  # noqa: ARG005
}

CLASSIFICATION: dict[str, tuple[Callable[[pd.DataFrame, Sequence[str]], Floats], Callable[[Floats], Floats]]] = {
    "accuracy": (lambda predictions, labels: value_and_one(right_rows(predictions, labels)), mean),
    **{f"macro_{name}": (_label_counts, _average(figure, weighted=False)) for name, figure in _FIGURES.items()},
    **{f"weighted_{name}": (_label_counts, _average(figure, weighted=True)) for name, figure in _FIGURES.items()},
    "log_loss": (lambda predictions, labels: value_and_one(row_log_loss(predictions, labels)), mean),
    "calibration_error": (bin_sums, _calibration_error),
    "outside_labels": (lambda predictions, labels: value_and_one(label_codes(predictions["prediction"], labels) < 0), mean),
}
"""Metric -> what each row adds, [N, S], and the metric from the sums over rows, from [R, S] to [R]."""
