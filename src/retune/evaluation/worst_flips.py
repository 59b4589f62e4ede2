"""The flips that a person should see: rows that one release has right and the other wrong, or whose text fell furthest."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from retune.config import Prompt
from retune.evaluation.flips import flips
from retune.evaluation.predictions import check_pair
from retune.evaluation.rouge import ROUGE, rouge
from retune.text import split_references

__all__ = ["Flip", "Flips", "worst_flips"]

MOST_NEGATIVE, MOST_POSITIVE, MOST_FALLS = 30, 10, 10
"""Rows that are listed."""


@dataclass(frozen=True)
class Flip:
    """One row, by its place in the test split."""

    row: int
    kind: str
    """What became of it, for a person."""


@dataclass(frozen=True)
class Flips:
    rows: int
    negative: int
    """Rows that the champion has right and the candidate wrong."""
    positive: int
    """The other way round."""
    listed: tuple[Flip, ...]
    """The worst first."""


def worst_flips(candidate: pd.DataFrame, champion: pd.DataFrame, prompt: Prompt) -> Flips:
    """task: classification: rows whose label is right for one and wrong for the other; those of which the candidate is surest come first.
    task: generation: counts by exact match; listed are the rows whose ROUGE-L fell most.

    Raises BadInputError as `check_pair` does.
    """
    check_pair(candidate, champion, list(prompt.labels))
    lost, won = flips(candidate, champion, list(prompt.labels))
    if prompt.task == "generation":
        before, after = _rouge_l(champion), _rouge_l(candidate)
        order = np.argsort(after - before, kind="stable")[:MOST_FALLS]
        listed = [Flip(int(row), f"ROUGE-L {before[row]:.4f} to {after[row]:.4f}") for row in order if after[row] < before[row]]
    else:
        surest = candidate[[f"p_{label}" for label in prompt.labels]].max(axis=1).fillna(0.0).to_numpy()
        order = np.argsort(-surest, kind="stable")
        listed = [Flip(int(row), "right to wrong") for row in order if lost[row]][:MOST_NEGATIVE]
        listed += [Flip(int(row), "wrong to right") for row in order if won[row]][:MOST_POSITIVE]
    return Flips(len(candidate), int(lost.sum()), int(won.sum()), tuple(listed))


def _rouge_l(predictions: pd.DataFrame) -> np.ndarray:
    place = ROUGE.index("rougeL")
    pairs = zip(predictions["prediction"].fillna("").astype(str), predictions["target"].astype(str), strict=True)
    return np.array([rouge(said, split_references(target))[place] for said, target in pairs])
