"""Is the candidate better than the champion on the same rows: a paired test and a paired bootstrap over groups of near-duplicates.

Both releases answer the same rows, so the difference is resampled, not each side by itself; and near-duplicates stand or fall
together, so whole groups are drawn (cluster bootstrap). Interval: percentile method, Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13; paired use in language processing: Koehn, EMNLP 2004; whole clusters: Davison & Hinkley, Bootstrap
Methods and their Application, 1997, section 3.8.

The percentile interval is too narrow in its far ends and where few groups tell the two apart. So a bound may pass zero only if a test
says so too that holds at any size: if the two are equally good, their answers to a group may as well be swapped (approximate
randomisation, Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989; for accuracy it is McNemar's exact test). It stops
early once the outcome is clear (Besag & Clifford, Biometrika 78, 1991).

Every metric here is a function of sums over rows, so one matrix product (draws times sums per group) replaces a pass over the
rows for each resample. Letters: N rows, G groups, R resamples, K labels, S sums.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from retune.errors import BadInputError, ConfigError
from retune.evaluation.classification import CLASSIFICATION
from retune.evaluation.flips import flips, mcnemar, share_bounds
from retune.evaluation.generation import GENERATION
from retune.evaluation.metrics import metric_named
from retune.evaluation.predictions import check_pair
from retune.evaluation.sums import Floats
from retune.policy import TASK_METRICS
from retune.records import Comparison

__all__ = ["BEYOND", "ROUNDING", "compare_groups", "measurably_better", "metric_interval", "paired_bootstrap", "swap_test"]

CHUNK_CELLS = 1_000_000
"""Draws held at a time, resamples times groups: about 25 MB."""
BLOCK = 256
"""Swaps between two looks at whether the test may stop."""
BEYOND = 20
"""Draws beyond an end of the interval, at least."""
FEW = 4
"""Groups of each kind, on average, from which on kinds are drawn: each draw costs more than that of a group."""
AS_LARGE = 50
"""Swaps that give as large a gain, from which a p-value is read."""
ROUNDING = 1e-9
"""Differences of metrics up to this are rounding of floats: they neither promote nor refuse."""


def paired_bootstrap(
    candidate: pd.DataFrame,
    champion: pd.DataFrame,
    metric: str,
    labels: Sequence[str],
    confidence: float,
    resamples: int,
    seed: int,
) -> Comparison:
    """Gain of the candidate over the champion in `metric`, in its unit, positive where the candidate is better.

    Two predictions frames over the same rows; `labels` is empty for task: generation. `low` and `high` are one-sided bounds, each at
    `confidence`, from `resamples` draws, or as many more as that level needs; neither passes zero unless the swap test does at the level.

    Raises BadInputError for frames with other ids, references, groups or order, and where the metric is no finite number;
    ConfigError for an unknown metric, confidence or number of resamples.
    """
    known = metric_named(metric)
    task = "classification" if labels else "generation"
    if metric not in TASK_METRICS[task]:
        raise ConfigError(f"metric must be one of {', '.join(TASK_METRICS[task])} for task: {task}, got {metric!r}")
    if not 0.5 < confidence < 1 or resamples < 1:
        raise ConfigError(f"confidence must be > 0.5 and < 1 and resamples >= 1, got {confidence} and {resamples}")
    check_pair(candidate, champion, labels)
    sums, total = _sums_of(metric, labels)
    groups = pd.factorize(candidate["group"])[0]
    ours, theirs = _by_group(sums(candidate), groups), _by_group(sums(champion), groups)
    mine, other = (total(side.sum(axis=0, keepdims=True)).item() for side in (ours, theirs))
    for role, value in (("candidate", mine), ("champion", other)):
        if not math.isfinite(value):
            raise BadInputError(f"{metric} must be a finite number to be compared, got {value} for the {role}")
    better, worse = swap_test(ours, theirs, total, known.sign, confidence, seed)
    draws = max(resamples, round(BEYOND / (1 - confidence)))
    lost, won = (int(rows.sum()) for rows in flips(candidate, champion, labels))
    won_low, won_high = share_bounds(won, won + lost, confidence) if won + lost else (0.0, 1.0)
    low, high = compare_groups(ours, theirs, total, known.sign, confidence, draws, seed)
    return Comparison(
        metric=metric,
        candidate=mine,
        champion=other,
        gain=known.sign * (mine - other),
        low=low if better <= 1 - confidence else min(low, 0.0),
        high=high if worse <= 1 - confidence else max(high, 0.0),
        p_better=better,
        p_worse=worse,
        confidence=confidence,
        resamples=draws,
        rows=len(candidate),
        won=won,
        lost=lost,
        won_low=won_low,
        won_high=won_high,
        mcnemar=mcnemar(won, lost),
    )


def metric_interval(
    predictions: pd.DataFrame, metric: str, labels: Sequence[str], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Ends of the bootstrap's interval of one release's metric, each at `confidence`; whole groups are drawn, as in `paired_bootstrap`."""
    sums, total = _sums_of(metric, labels)
    of_group = _by_group(sums(predictions), pd.factorize(predictions["group"])[0])
    values = np.concatenate([total(draws @ of_group) for draws in _draws(np.ones(len(of_group), dtype=np.int64), resamples, seed)])
    return float(np.quantile(values, 1 - confidence, method="lower")), float(np.quantile(values, confidence, method="higher"))


def measurably_better(low: float, gain: float, min_gain: float) -> bool:
    """Whether a gain promotes. low: lower end of its interval, as in a `Comparison`."""
    return low > ROUNDING and gain >= min_gain - ROUNDING


def swap_test(
    ours: Floats, theirs: Floats, total: Callable[[Floats], Floats], sign: int, confidence: float, seed: int
) -> tuple[float, float]:
    """p-values that the candidate is better, and that it is worse, by swapping the two sides' sums of each group at random.

    ours, theirs: [G, S]. Exact but for the number of swaps: under equal quality each is at most p with probability p.
    """
    rng = np.random.default_rng(seed)
    all_ours, all_theirs = ours.sum(axis=0), theirs.sum(axis=0)
    change = (theirs - ours)[(ours != theirs).any(axis=1)]  # the other groups change nothing
    observed = sign * (total(all_ours[None]).item() - total(all_theirs[None]).item())
    most = round(AS_LARGE / (1 - confidence))
    above = below = done = 0
    while done < most and min(above, below) < AS_LARGE:
        count = min(BLOCK, most - done)
        moved = (rng.random((count, len(change))) < 0.5) @ change  # [R, S]
        gains = sign * (total(all_ours + moved) - total(all_theirs - moved))
        above += int((gains >= observed - ROUNDING).sum())
        below += int((gains <= observed + ROUNDING).sum())
        done += count
    return (1 + above) / (1 + done), (1 + below) / (1 + done)


def compare_groups(
    ours: Floats, theirs: Floats, total: Callable[[Floats], Floats], sign: int, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Ends of the bootstrap's interval of the gain, each at `confidence`. ours, theirs: [G, S]."""
    gains = np.empty(resamples)
    done = 0
    kinds, alike = np.unique(np.concatenate([ours, theirs], axis=1), axis=0, return_counts=True)
    if FEW * len(kinds) <= len(ours):  # as in a classification: groups that are answered alike are drawn together
        ours, theirs = np.split(kinds, 2, axis=1)
    else:
        alike = np.ones(len(ours), dtype=np.int64)
    for draws in _draws(alike, resamples, seed):
        gains[done : done + len(draws)] = sign * (total(draws @ ours) - total(draws @ theirs))
        done += len(draws)
    return float(np.quantile(gains, 1 - confidence, method="lower")), float(np.quantile(gains, confidence, method="higher"))


def _sums_of(metric: str, labels: Sequence[str]) -> tuple[Callable[[pd.DataFrame], Floats], Callable[[Floats], Floats]]:
    """What each row adds, [N, S], and the metric from sums of it, from [R, S] to [R]."""
    if not labels:
        return GENERATION[metric]
    sums, total = CLASSIFICATION[metric]
    return lambda predictions: sums(predictions, labels), total


def _draws(alike: npt.NDArray[np.int64], resamples: int, seed: int) -> Iterator[Floats]:
    """How often each kind of group is drawn in each resample, a chunk at a time: [about CHUNK_CELLS / kinds, kinds], R rows in all.

    alike: groups of each kind, G in all.
    """
    rng = np.random.default_rng(seed)
    kinds, groups = len(alike), int(alike.sum())
    size = max(1, CHUNK_CELLS // kinds)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        if kinds < groups:
            yield rng.multinomial(groups, alike / groups, size=count).astype(np.float64)
            continue
        drawn = rng.integers(groups, size=(count, groups))
        drawn += np.arange(count)[:, None] * groups
        yield np.bincount(drawn.ravel(), minlength=count * groups).reshape(count, groups).astype(np.float64)


def _by_group(sums: Floats, groups: npt.NDArray[np.intp]) -> Floats:
    """Sums over the rows of each group, from [N, S] to [G, S]."""
    totals = np.zeros((int(groups.max()) + 1, sums.shape[1]))
    np.add.at(totals, groups, sums)
    return totals
