"""Rows on which two releases disagree: what a gain is made of. Letters: N rows."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import beta, binomtest

from retune.evaluation.classification import right_rows
from retune.evaluation.generation import exact_matches

__all__ = ["flips", "mcnemar", "share_bounds"]


def flips(candidate: pd.DataFrame, champion: pd.DataFrame, labels: Sequence[str]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Rows that the champion alone has right, and those that the candidate alone has right: [N], [N].

    Right is the reference's label or, of a text (no labels), one of its references to the letter. The frames hold the same rows.
    """
    ours, theirs = (right_rows(side, labels) if labels else exact_matches(side) for side in (candidate, champion))
    return theirs & ~ours, ours & ~theirs


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test: that of two equally good releases either one has such a lead (Psychometrika 12, 1947)."""
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def share_bounds(count: int, rows: int, confidence: float) -> tuple[float, float]:
    """One-sided ends of the exact interval of a share, each at `confidence` (Clopper & Pearson, Biometrika 26, 1934)."""
    low = float(beta.ppf(1 - confidence, count, rows - count + 1)) if count else 0.0
    high = float(beta.ppf(confidence, count + 1, rows - count)) if count < rows else 1.0
    return low, high
