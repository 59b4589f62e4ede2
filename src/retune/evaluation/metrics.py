"""Metrics of one release on one test split. Those of task: generation are computed in `retune.evaluation.generation`.

How labels that do not occur and predictions outside of them count stands in `retune.evaluation.classification`. Letters: N rows, K labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from retune.config import Prompt
from retune.errors import ConfigError
from retune.evaluation.classification import CLASSIFICATION
from retune.evaluation.generation import GENERATION, measured, signatures
from retune.evaluation.predictions import check_predictions, label_codes, rows_sha256, slice_values
from retune.evaluation.sums import Floats
from retune.records import Evaluation

__all__ = [
    "METRICS",
    "Metric",
    "aggregate_metrics",
    "confusion",
    "evaluate",
    "metric_named",
    "per_class",
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


_TASKS: dict[str, tuple[Metric, ...]] = {
    "classification": (
        Metric("accuracy", True, "share of rows, 0 to 1"),
        *(Metric(f"macro_{name}", True, f"mean {name} of the labels, 0 to 1") for name in ("f1", "precision", "recall")),
        *(
            Metric(f"weighted_{name}", True, f"mean {name} of the labels weighted by their rows, 0 to 1")
            for name in ("f1", "precision", "recall")
        ),
        Metric("log_loss", False, "nats per row, 0 or more"),
        Metric("calibration_error", False, "mean distance of confidence and accuracy in 10 bins, 0 to 1"),
        Metric("outside_labels", False, "share of rows, 0 to 1"),
    ),
    "generation": (
        Metric("rouge1", True, "mean F of words, best reference, 0 to 1"),
        Metric("rouge2", True, "mean F of word pairs, best reference, 0 to 1"),
        Metric("rougeL", True, "mean F of the longest common subsequence, best reference, 0 to 1"),
        Metric("bleu", True, "sacreBLEU's BLEU of all rows, 0 to 100"),
        Metric("chrf", True, "sacreBLEU's chrF2 of all rows, 0 to 100"),
        Metric("exact_match", True, "share of rows, 0 to 1"),
        Metric("perplexity", False, "of the references, per token, 1 or more"),
        Metric("perplexity_per_byte", False, "of the references, per byte of UTF-8, 1 or more"),
        Metric("fluency", False, "perplexity of the outputs under the base model alone, per token, 1 or more"),
        Metric("relevance", True, "mean cosine of the encoder's embeddings of input and output, -1 to 1"),
        Metric("empty_outputs", False, "share of rows, 0 to 1"),
        Metric("truncated_outputs", False, "share of rows cut at generation.max_new_tokens, 0 to 1"),
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
    """The metrics that `evaluate` may report for a task, in the order of tables."""
    return _TASKS[task]


def evaluate(predictions: pd.DataFrame, prompt: Prompt, release: str, evaluator: str, probes: pd.DataFrame | None = None) -> Evaluation:
    """Aggregates of a predictions frame (columns: `retune.evaluation.predictions`).

    `prompt` is today's: its labels and slices count, not the release's own. `evaluator` is the hash of the evaluation code. `probes`: a
    predictions frame of other rows, with their `set` and, of a changed test row, the id of the row `of` which it was made.
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
        sets=_sets(predictions, probes, labels) if probes is not None else {},
        signatures={} if labels else signatures(predictions),
    )


def _sets(predictions: pd.DataFrame, probes: pd.DataFrame, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Set -> metrics, rows and, of a probe, the share of rows that are not answered as the unchanged row is."""
    unchanged = predictions.set_index("id")["prediction"].fillna("")
    found: dict[str, dict[str, float]] = {}
    for name, part in probes.groupby("set", sort=False):
        check_predictions(part, labels)
        found[str(name)] = {**aggregate_metrics(part, labels), "rows": len(part)}
        if part["of"].notna().all():
            before = unchanged.loc[part["of"]].to_numpy()
            found[str(name)]["changed"] = float((part["prediction"].fillna("").to_numpy() != before).mean())
    return found


def aggregate_metrics(predictions: pd.DataFrame, labels: Sequence[str]) -> dict[str, float]:
    """Metric name -> value over all rows, in the unit of its `Metric`; `labels` is empty for task: generation.

    What scikit-learn has is scikit-learn's, so that the gate, which sums over rows, is checked against it. Metrics whose columns the
    predictions lack (fluency, relevance) are left out.
    """
    if not labels:
        there = [metric.name for metric in task_metrics("generation") if measured(metric.name, predictions)]
        return {name: _whole(total, rows(predictions)) for name in there for rows, total in [GENERATION[name]]}
    target, prediction = _codes(predictions, labels)
    found = {"accuracy": float(accuracy_score(target, prediction))}
    for average in ("macro", "weighted"):
        figures = precision_recall_fscore_support(target, prediction, labels=np.unique(target), average=average, zero_division=0)
        precision, recall, f1, _ = figures
        found |= {f"{average}_f1": float(f1), f"{average}_precision": float(precision), f"{average}_recall": float(recall)}
    for name in ("log_loss", "calibration_error", "outside_labels"):
        sums, total = CLASSIFICATION[name]
        found[name] = _whole(total, sums(predictions, labels))
    return found


def _whole(total: Callable[[Floats], Floats], sums: Floats) -> float:
    """A metric of all rows together. sums: [N, S]."""
    return float(total(sums.sum(axis=0, keepdims=True)).item())


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


def _codes(predictions: pd.DataFrame, labels: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """References as 0 to K - 1 and predictions as 0 to K, where K is outside of the labels: [N], [N]."""
    prediction = label_codes(predictions["prediction"], labels)
    return label_codes(predictions["target"], labels), np.where(prediction < 0, len(labels), prediction)
