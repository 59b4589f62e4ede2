"""Metrics as functions of sums over rows: what a mean adds up. Letters: N rows, R resamples."""

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "mean", "value_and_one"]

Floats = npt.NDArray[np.float64]


def value_and_one(values: npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> Floats:
    """The value of each row beside a 1, so that a mean is the ratio of two sums: [N, 2]."""
    return np.column_stack([values.astype(np.float64), np.ones(len(values))])


def mean(sums: Floats) -> Floats:
    """[R, 2] -> [R]."""
    return np.asarray(sums[:, 0] / sums[:, 1], dtype=np.float64)
