"""Gates beside the gain itself: that nothing else is lost. Each function returns a `Gate`; what it raises is that gate's failure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from retune.config import Splits
from retune.errors import BadInputError
from retune.evaluation.comparison import ROUNDING, metric_interval, paired_bootstrap
from retune.evaluation.flips import flips, share_bounds
from retune.evaluation.metrics import Metric, metric_named
from retune.evaluation.predictions import check_pair, slice_values
from retune.policy import Policy
from retune.records import Evaluation, Gate

__all__ = ["SET", "Side", "changed", "figure", "finite", "listed", "margin", "negative_flips", "signed", "slice_floor", "slices"]

MAX_NAMED = 5
"""Slices named in one sentence; more are counted."""
SET = "set"
"""Stands for a slice column where labelled sets and probes are named: set=NAME."""


@dataclass(frozen=True)
class Side:
    """One release in the comparison."""

    evaluation: Evaluation
    predictions: pd.DataFrame
    """The frame that `evaluation` was made from (columns: `retune.evaluation.predictions`)."""
    splits: Splits | None
    """Splits in the release's own prompt file, which the candidate's test rows come from; None for a champion that was tuned on no
    rows (the template alone)."""
    base_model: str
    """sha256 or revision of the base model."""
    probes: pd.DataFrame | None = None
    """Predictions of the labelled sets and probes, their `set` beside them."""


def margin(candidate: Side, champion: Side, name: str, largest: float, policy: Policy, labels: Sequence[str], seed: int) -> Gate:
    """Non-inferiority in a metric: that less than the margin is lost must be shown, not just not be ruled out."""
    found = paired_bootstrap(candidate.predictions, champion.predictions, name, labels, policy.confidence, policy.resamples, seed)
    passed = found.low > -largest
    lost = found.high < -largest
    outcome = "loses more than" if lost else "is shown to lose less than" if passed else "cannot be shown to lose less than"
    reason = (
        f"{name} {outcome} the margin of {figure(largest)}: {figure(found.candidate)} against {figure(found.champion)}, a gain of "
        f"{signed(found.gain)} (from {signed(found.low)} to {signed(found.high)}, each end at {100 * found.confidence:.4g} % confidence)."
    )
    return Gate(f"margins.{name}", passed, reason, found.gain, -largest, found.low, found.high, on_fail="REJECT" if lost else "HOLD")


def slice_floor(candidate: Side, name: str, floor: float, policy: Policy, labels: Sequence[str], seed: int) -> Gate:
    """A floor in one slice or set, whatever its size: somebody named it. The metric itself must meet it; its interval is told beside."""
    metric = metric_named(policy.metric)
    figures = _flat(candidate.evaluation).get(name, {})
    value = figures.get(policy.metric, math.nan)
    passed = metric.sign * (value - floor) >= -ROUNDING
    low: float | None = None
    high: float | None = None
    if policy.metric not in figures:
        reason = f"The candidate has no {policy.metric} for {name}, whose floor is {figure(floor)}."
    else:
        ends = metric_interval(_part(candidate, name), policy.metric, labels, policy.confidence, policy.resamples, seed)
        low, high = map(finite, ends)
        outcome = "which meets" if passed else "which misses"
        reason = f"{policy.metric} in {name} ({figures['rows']:,.0f} rows) is {figure(value)}, {outcome} its floor of {figure(floor)}."
    return Gate(f"slice_floors.{name}", passed, reason, finite(value), finite(floor), low, high, on_fail="REJECT")


def negative_flips(candidate: Side, champion: Side, policy: Policy, labels: Sequence[str]) -> Gate:
    """Rows that the champion has right and the candidate wrong: what users notice (arXiv:2011.09161)."""
    check_pair(candidate.predictions, champion.predictions, labels)
    lost, won = flips(candidate.predictions, champion.predictions, labels)
    rows, count = len(lost), int(lost.sum())
    low, high = share_bounds(count, rows, policy.confidence)
    largest = policy.max_negative_flips
    passed = largest is None or count / rows <= largest + ROUNDING
    limit = "max_negative_flips is not set" if largest is None else f"{'at' if passed else 'over'} most {100 * largest:.3g} % are allowed"
    reason = (
        f"{count:,} of {rows:,} rows that the champion has right are wrong now, {100 * count / rows:.3g} % "
        f"(from {100 * low:.3g} to {100 * high:.3g} %), and {int(won.sum()):,} the other way round; {limit}."
    )
    return Gate("negative_flips", passed, reason, count / rows, largest, low, high, on_fail="REJECT")


def changed(candidate: Evaluation, name: str, largest: float, policy: Policy) -> Gate:
    """Share of a probe's rows that are not answered as the row is without the change."""
    figures = candidate.sets.get(name, {})
    if "changed" not in figures:
        reason = f"No test row was changed by the probe {name}, so that max_changed.{name} cannot be checked; look at evaluate.probes."
        return Gate(f"max_changed.{name}", False, reason, threshold=largest)
    share, rows = figures["changed"], int(figures["rows"])
    low, high = share_bounds(round(share * rows), rows, policy.confidence)
    passed = share <= largest + ROUNDING
    reason = (
        f"{100 * share:.3g} % of {rows:,} rows get another answer under {name} (from {100 * low:.3g} to {100 * high:.3g} %); "
        f"at most {100 * largest:.3g} % are allowed."
    )
    return Gate(f"max_changed.{name}", passed, reason, share, largest, low, high, on_fail="REJECT")


def slices(candidate: Side, champion: Side, policy: Policy, labels: Sequence[str], seed: int) -> Gate:
    """That the metric falls too far in no slice, labelled set or probe. The interval is that of the largest fall."""
    metric = metric_named(policy.metric)
    ours, theirs = _flat(candidate.evaluation), _flat(champion.evaluation)
    lacking = [name for name in theirs if policy.metric not in ours.get(name, {})]
    if lacking:
        return Gate("slices", False, f"The candidate has no {policy.metric} for {listed(lacking)}.", on_fail="REJECT")
    unlike = [
        name for name, figures in ours.items() if policy.metric not in theirs.get(name, {}) or figures["rows"] != theirs[name]["rows"]
    ]
    if unlike:
        return Gate("slices", False, f"The champion was not measured on the same rows in {listed(unlike)}. Evaluate both again.")
    if policy.max_slice_gap is None:
        reason = f"max_slice_gap is not set: {len(ours)} slices and sets are reported, none is guarded."
        return Gate("slices", True, reason, on_fail="REJECT")
    falls = {name: _fall(metric, figures, theirs[name]) for name, figures in ours.items() if figures["rows"] >= policy.min_slice_rows}
    if not falls:
        reason = f"No slice or set has the {policy.min_slice_rows} rows from which it is guarded."
        return Gate("slices", True, reason, threshold=finite(policy.max_slice_gap), on_fail="REJECT")
    too_far = [name for name, fall in falls.items() if not (math.isfinite(fall) and fall <= policy.max_slice_gap + ROUNDING)]
    worst = max(falls, key=lambda name: falls[name] if math.isfinite(falls[name]) else math.inf)
    if too_far:
        shown = [f"{name} ({_change(policy.metric, ours[name], theirs[name])})" for name in sorted(too_far, key=lambda name: name != worst)]
        reason = f"{policy.metric} gets worse by more than {figure(policy.max_slice_gap)} in {listed(shown)}."
    else:
        reason = (
            f"{policy.metric} gets worse by more than {figure(policy.max_slice_gap)} in none of {len(falls)} guarded slices and sets; "
            f"the least favourable change is in {worst} ({_change(policy.metric, ours[worst], theirs[worst])})."
        )
    low = high = None
    if math.isfinite(falls[worst]):
        ours_there, theirs_there = _part(candidate, worst), _part(champion, worst)
        found = paired_bootstrap(ours_there, theirs_there, policy.metric, labels, policy.confidence, policy.resamples, seed)
        low, high = -found.high, -found.low
    return Gate("slices", not too_far, reason, finite(falls[worst]), finite(policy.max_slice_gap), low, high, on_fail="REJECT")


def _part(side: Side, name: str) -> pd.DataFrame:
    """Predictions of a slice or set."""
    column, _, value = name.partition("=")
    if column != SET:
        return side.predictions[slice_values(side.predictions, column) == value]
    if side.probes is None:
        raise BadInputError(f"the predictions of {name} are missing")
    return side.probes[side.probes["set"] == value]


def _flat(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    everything = {**evaluation.slices, SET: evaluation.sets}
    return {f"{column}={value}": figures for column, values in everything.items() for value, figures in values.items()}


def _fall(metric: Metric, candidate: dict[str, float], champion: dict[str, float]) -> float:
    return metric.sign * (champion[metric.name] - candidate[metric.name])


def _change(metric: str, candidate: dict[str, float], champion: dict[str, float]) -> str:
    return f"{figure(champion[metric])} to {figure(candidate[metric])}, {candidate['rows']:,.0f} rows"


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def figure(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.00005 else f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.1e}" if 0 < abs(value) < 0.00005 else f"{value:+.4f}"


def finite(value: float) -> float | None:
    """JSON has no NaN: a value that is none is left out of the record and stands in the reason."""
    return value if math.isfinite(value) else None
