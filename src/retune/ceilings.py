"""Gates on what task `measure` found: the prompt's checks, the time of a prediction, the cost of tuning. Pure, as `retune.promotion` is."""

import math
from collections.abc import Mapping, Sequence

from retune.errors import BadInputError
from retune.evaluation.roles import CANDIDATE, CHAMPION
from retune.policy import Policy
from retune.records import CheckResult, Gate, Measured

__all__ = ["checks_gate", "cost_gate", "latency_gate"]

MAX_NAMED = 5
"""Failed checks told in one sentence; more are counted."""


def checks_gate(checks: Sequence[CheckResult] | None) -> Gate:
    """`checks`: None for a prompt without a file of checks; empty where there is one and none was run."""
    if checks is None:
        return Gate("checks", True, "The prompt has no file of checks.", on_fail="REJECT")
    if not checks:
        return Gate("checks", False, "The prompt has checks, but not all of them were run on the candidate. Run task measure again.")
    required = [check for check in checks if check.required]
    failed = [check for check in required if check.passed is not True]
    reported = sum(check.passed is not True for check in checks) - len(failed)
    also = f" {reported} of {len(checks) - len(required)} that are only reported failed." if reported else ""
    if failed:
        told = " ".join(f"{check.name}: {check.reason}" for check in failed[:MAX_NAMED])
        more = f" And {len(failed) - MAX_NAMED} more." if len(failed) > MAX_NAMED else ""
        reason = f"{len(failed)} of {len(required)} required checks failed. {told}{more}{also}"
    else:
        reason = f"All {len(required)} required checks passed.{also}"
    return Gate("checks", not failed, reason, float(len(failed)), 0.0, on_fail="REJECT")


def latency_gate(measured: Mapping[str, Measured] | None, policy: Policy) -> Gate:
    """`measured`: role -> figures, of candidate and champion; None where nothing was timed."""
    if policy.max_latency_ms is None and policy.max_latency_ratio is None:
        reason = "Neither max_latency_ms nor max_latency_ratio is set: the time of a prediction is reported only."
        return Gate("latency", True, reason, on_fail="REJECT")
    ours = _milliseconds(measured, CANDIDATE)
    limits, words = [], []
    if policy.max_latency_ms is not None:
        limits.append(policy.max_latency_ms)
        words.append(f"{policy.max_latency_ms:g} ms")
    if policy.max_latency_ratio is not None:
        theirs = _milliseconds(measured, CHAMPION)
        limits.append(policy.max_latency_ratio * theirs)
        words.append(f"{policy.max_latency_ratio:g} times the champion's {theirs:.1f} ms")
    passed = all(ours <= limit for limit in limits)
    outcome = "within" if passed else "more than allowed:"
    reason = f"A prediction of the candidate takes {ours:.1f} ms at the 95th percentile, {outcome} {' and '.join(words)}."
    return Gate("latency", passed, reason, ours, min(limits), on_fail="REJECT")


def cost_gate(measured: Mapping[str, Measured] | None, policy: Policy) -> Gate:
    """`measured`: as in `latency_gate`."""
    if policy.max_cost is None:
        return Gate("cost", True, "max_cost is not set: the cost of tuning is reported only.", on_fail="REJECT")
    ours = _figures(measured, CANDIDATE)
    if not math.isfinite(ours.tune_seconds):
        raise BadInputError("the candidate's tuning seconds are not known; another tune.seed makes it anew")
    if ours.cost is None or not math.isfinite(ours.cost):
        raise BadInputError(f"max_cost is {policy.max_cost:g}, and no hour has a price; set RETUNE_DEVICE_HOUR_PRICE where tasks run")
    passed = ours.cost <= policy.max_cost
    outcome = "within" if passed else "more than"
    reason = f"Tuning the candidate took {ours.tune_seconds:,.0f} s at a cost of {ours.cost:.4g}, {outcome} max_cost {policy.max_cost:g}."
    return Gate("cost", passed, reason, ours.cost, policy.max_cost, on_fail="REJECT")


def _figures(measured: Mapping[str, Measured] | None, role: str) -> Measured:
    if measured is None or role not in measured:
        raise BadInputError(f"nothing was measured of the {role}; run task measure again")
    return measured[role]


def _milliseconds(measured: Mapping[str, Measured] | None, role: str) -> float:
    """95th percentile, a finite number above 0."""
    found = _figures(measured, role).latency_p95_ms
    if not (math.isfinite(found) and found > 0):
        raise BadInputError(f"a prediction's milliseconds must be above 0, got {found} for the {role}; run task measure again")
    return found
