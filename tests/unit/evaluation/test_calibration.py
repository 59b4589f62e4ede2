"""Calibration error: bins of equal width over the top label's probability (Naeini, Cooper, Hauskrecht, AAAI 2015), by hand.

No probability lies on an edge between two bins, where definitions differ and floats decide.
"""

import numpy as np
import pandas as pd
import pytest

from retune.evaluation.comparison import CLASSIFICATION
from retune.evaluation.metrics import aggregate_metrics, metric_named

LABELS = ["low", "high"]


def frame(rows):
    """Rows of (probability of the top label, whether it is right); the top label is low in even rows, high in odd ones."""
    top = [LABELS[row % 2] for row in range(len(rows))]
    other = [LABELS[1 - row % 2] for row in range(len(rows))]
    given = {label: [chance if label == said else 1 - chance for (chance, _), said in zip(rows, top, strict=True)] for label in LABELS}
    return pd.DataFrame(
        {
            "id": range(len(rows)),
            "group": range(len(rows)),
            "target": [said if right else not_said for (_, right), said, not_said in zip(rows, top, other, strict=True)],
            "prediction": top,
            **{f"p_{label}": chances for label, chances in given.items()},
        }
    )


def error(of, weights=None):
    sums, total = CLASSIFICATION["calibration_error"]
    each = sums(of, LABELS)
    return total(np.ones((1, len(of))) @ each if weights is None else np.asarray(weights, dtype=np.float64) @ each)


def test_two_bins():
    """(0.8, 0.9]: mean 0.85, half right, off by 0.35. (0.6, 0.7]: mean 0.63, all right, off by 0.37. Half of the rows in each."""
    found = frame([(0.86, True), (0.84, False), (0.65, True), (0.61, True)])
    assert error(found).item() == pytest.approx(0.5 * 0.35 + 0.5 * 0.37)
    assert aggregate_metrics(found, LABELS)["calibration_error"] == pytest.approx(0.36)


def test_bins_count_by_their_rows():
    """3 of 4 rows in (0.9, 1]: mean 0.96, 2/3 right. One in (0.5, 0.6]: 0.52, wrong."""
    found = frame([(0.95, True), (0.97, True), (0.96, False), (0.52, False)])
    assert error(found).item() == pytest.approx(3 / 4 * (0.96 - 2 / 3) + 1 / 4 * 0.52)


def test_as_often_right_as_it_says_is_no_error():
    assert error(frame([(0.75, row < 15) for row in range(20)])).item() == pytest.approx(0)


def test_too_sure_and_too_unsure_cancel_within_a_bin_and_not_across():
    within = frame([(0.75, True), (0.75, True), (0.75, True), (0.75, False)])
    across = frame([(0.95, False), (0.55, True)])
    assert error(within).item() == pytest.approx(0)
    assert error(across).item() == pytest.approx((0.95 + 0.45) / 2)


def test_a_probability_of_one_is_in_the_last_bin():
    """Mean 0.975, half right."""
    assert error(frame([(1.0, True), (0.95, False)])).item() == pytest.approx(0.475)


def test_a_resample_is_scored_as_rows_of_its_own():
    rng = np.random.default_rng(5)
    found = frame([(chance, bool(right)) for chance, right in zip(rng.uniform(0.501, 0.999, 60), rng.random(60) < 0.7, strict=True)])
    draws = rng.multinomial(60, np.full(60, 1 / 60), size=4)
    alone = [error(found.iloc[np.repeat(np.arange(60), draw)].reset_index(drop=True)).item() for draw in draws]
    assert error(found, draws) == pytest.approx(alone)


def test_three_labels_have_a_top_one_too():
    """Bin by bin, in plain Python, of the largest of three probabilities."""
    labels = ["low", "medium", "high"]
    rng = np.random.default_rng(2)
    chances, target = rng.dirichlet([1.0, 1.0, 1.0], size=300), rng.integers(3, size=300)
    top = chances.argmax(axis=1)
    found = pd.DataFrame(
        {
            "id": range(300),
            "group": range(300),
            "target": [labels[code] for code in target],
            "prediction": [labels[code] for code in top],
            **{f"p_{label}": chances[:, k] for k, label in enumerate(labels)},
        }
    )
    expected = 0.0
    for place in range(10):
        inside = [row for row in range(300) if place / 10 <= chances[row, top[row]] < (place + 1) / 10]
        if inside:
            sure = sum(chances[row, top[row]] for row in inside) / len(inside)
            right = sum(bool(top[row] == target[row]) for row in inside) / len(inside)
            expected += len(inside) / 300 * abs(sure - right)
    assert expected > 0.1
    assert aggregate_metrics(found, labels)["calibration_error"] == pytest.approx(expected)


def test_lower_is_better():
    assert metric_named("calibration_error").higher_is_better is False
