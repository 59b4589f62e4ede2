"""Metrics of one release on one test split. Those of task: generation are computed in `retune.evaluation.generation`.

Macro F1 is the mean over the labels that occur among the references of the rows at hand, so that a slice in which a label never
occurs can still reach 1. Predictions outside of the labels are wrong: they lower the recall of the true label and are no label's
false positive. Letters: N rows, K labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from retune.config import Prompt
from retune.errors import ConfigError
from retune.evaluation.generation import GENERATION, signatures
from retune.evaluation.predictions import check_predictions, label_codes, probabilities, rows_sha256, slice_values
from retune.records import Evaluation

__all__ = [
    "ACCURACY",
    "LOG_LOSS",
    "MACRO_F1",
    "METRICS",
    "WEIGHTED_F1",
    "Metric",
    "aggregate_metrics",
    "confusion",
    "evaluate",
    "metric_named",
    "per_class",
    "row_log_loss",
    "task_metrics",
]


@dataclass(frozen=True)
class Metric:
    name: str
    higher_is_better: bool | None
    """None: neither, so that no policy can name it."""
    unit: str

    @property
    def sign(self) -> int:
        """Factor that turns a difference into a gain: 1, or -1 where lower is better."""
        return -1 if self.higher_is_better is False else 1


ACCURACY = Metric("accuracy", True, "share of rows, 0 to 1")
MACRO_F1 = Metric("macro_f1", True, "mean F1 of the labels, 0 to 1")
WEIGHTED_F1 = Metric("weighted_f1", True, "mean F1 of the labels weighted by their rows, 0 to 1")
LOG_LOSS = Metric("log_loss", False, "nats per row, 0 or more")

_TASKS: dict[str, tuple[Metric, ...]] = {
    "classification": (ACCURACY, MACRO_F1, WEIGHTED_F1, LOG_LOSS),
    "generation": (
        Metric("rouge1", True, "mean F of words, best reference, 0 to 1"),
        Metric("rouge2", True, "mean F of word pairs, best reference, 0 to 1"),
        Metric("rougeL", True, "mean F of the longest common subsequence, best reference, 0 to 1"),
        Metric("bleu", True, "sacreBLEU's BLEU of all rows, 0 to 100"),
        Metric("chrf", True, "sacreBLEU's chrF2 of all rows, 0 to 100"),
        Metric("exact_match", True, "share of rows, 0 to 1"),
        Metric("perplexity", False, "of the references, per token, 1 or more"),
        Metric("empty_outputs", False, "share of rows, 0 to 1"),
        Metric("output_words", None, "mean words of a row's output"),
    ),
}
METRICS: dict[str, Metric] = {metric.name: metric for metrics in _TASKS.values() for metric in metrics}
"""Every metric by name."""


def metric_named(name: str) -> Metric:
    """Raises ConfigError for an unknown name, listing the known ones."""
    if name not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]


def task_metrics(task: Literal["classification", "generation"]) -> tuple[Metric, ...]:
    """The metrics that `evaluate` reports for a task, in the order of tables."""
    return _TASKS[task]


def evaluate(predictions: pd.DataFrame, prompt: Prompt, release: str, evaluator: str) -> Evaluation:
    """Aggregates of a predictions frame (columns: `retune.evaluation.predictions`).

    `prompt` is today's: its labels and slices count, not the release's own. `evaluator` is the hash of the evaluation code.
    A probability that is not a finite number makes log_loss NaN: the gate refuses such a release, with its figures at hand.
    Raises BadInputError where the frame is not one.
    """
    labels = list(prompt.labels)
    check_predictions(predictions, labels, list(prompt.slices))
    slices: dict[str, dict[str, dict[str, float]]] = {}
    for column in prompt.slices:
        parts = predictions.groupby(slice_values(predictions, column), sort=True)
        slices[column] = {str(value): {**aggregate_metrics(part, labels), "rows": len(part)} for value, part in parts}
    return Evaluation(
        release=release,
        rows=len(predictions),
        test_sha256=rows_sha256(predictions),
        evaluator=evaluator,
        metrics=aggregate_metrics(predictions, labels),
        per_class=per_class(predictions, labels),
        slices=slices,
        signatures={} if labels else signatures(predictions),
    )


def aggregate_metrics(predictions: pd.DataFrame, labels: Sequence[str]) -> dict[str, float]:
    """Metric name -> value over all rows, in the unit of its `Metric`; `labels` is empty for task: generation."""
    if not labels:
        return {
            metric.name: total(rows(predictions).sum(axis=0, keepdims=True)).item()
            for metric in task_metrics("generation")
            for rows, total in [GENERATION[metric.name]]
        }
    target, prediction = _codes(predictions, labels)
    present = np.unique(target)
    return {
        ACCURACY.name: float(accuracy_score(target, prediction)),
        MACRO_F1.name: float(f1_score(target, prediction, labels=present, average="macro", zero_division=0)),
        WEIGHTED_F1.name: float(f1_score(target, prediction, labels=present, average="weighted", zero_division=0)),
        LOG_LOSS.name: float(row_log_loss(predictions, labels).mean()),
    }


def per_class(predictions: pd.DataFrame, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Label -> precision, recall, f1 (0 where undefined) and rows (references); empty for task: generation."""
    if not labels:
        return {}
    target, prediction = _codes(predictions, labels)
    columns = precision_recall_fscore_support(target, prediction, labels=range(len(labels)), zero_division=0)
    return {
        label: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}
        for label, precision, recall, f1, rows in zip(labels, *columns, strict=True)
    }


def confusion(predictions: pd.DataFrame, labels: Sequence[str]) -> npt.NDArray[np.int64]:
    """Rows by reference and prediction, in the order of `labels`; the last column holds predictions outside of them: [K, K + 1]."""
    target, prediction = _codes(predictions, labels)
    matrix = confusion_matrix(target, prediction, labels=range(len(labels) + 1))
    return np.asarray(matrix[: len(labels)], dtype=np.int64)


def row_log_loss(predictions: pd.DataFrame, labels: Sequence[str]) -> npt.NDArray[np.float64]:
    """Minus the log probability of the reference, in nats, at most about 36: a probability of 0 counts as 2e-16. [N]"""
    given = probabilities(predictions, labels)[np.arange(len(predictions)), label_codes(predictions["target"], labels)]
    eps = np.finfo(np.float64).eps
    losses: npt.NDArray[np.float64] = -np.log(np.clip(given, eps, 1 - eps))
    return losses


def _codes(predictions: pd.DataFrame, labels: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """References as 0 to K - 1 and predictions as 0 to K, where K is outside of the labels: [N], [N]."""
    prediction = label_codes(predictions["prediction"], labels)
    return label_codes(predictions["target"], labels), np.where(prediction < 0, len(labels), prediction)
