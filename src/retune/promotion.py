"""The gate: may the candidate replace the champion? Pure: two evaluated releases and a policy in, a decision with its reasons out.

| gate | fails when | verdict |
|---|---|---|
| different_release | the candidate is the champion itself | HOLD |
| not_barred | the release was rolled back and not unbarred | HOLD |
| same_test_rows | test rows, their references or the evaluation code differ, or predictions and figures do not belong together | HOLD |
| complete | a figure of the candidate is missing or no finite number (REJECT), or one of the champion is (HOLD) | REJECT, HOLD |
| same_splits | the champion was tuned on other splits: it may have seen test rows | HOLD |
| looks | other comparisons have used up the chance of luck that `confidence` leaves to this test split | HOLD |
| gain | the metric is measurably worse (REJECT), indistinguishable (HOLD) or rises by less than min_gain (HOLD) | REJECT, HOLD |
| floors | a metric misses its floor; one gate per floor, named floors.METRIC | REJECT |
| margins | another metric loses more than its margin (REJECT), or may do so (HOLD); margins.METRIC | REJECT, HOLD |
| slice_floors | the metric misses the floor of a slice or set, or is missing there; slice_floors.NAME | REJECT |
| slices | the metric falls too far in a slice, labelled set or probe, or is missing there (for the champion: HOLD) | REJECT, HOLD |
| negative_flips | too many rows that the champion has right are wrong now | REJECT |
| max_changed | a probe changes too many answers (REJECT), or was not made (HOLD); max_changed.PROBE | REJECT, HOLD |
| checks | a required check of `prompts/<prompt>.checks.yaml` fails (REJECT), or none was run (HOLD) | REJECT, HOLD |
| latency | a prediction takes longer than max_latency_ms or max_latency_ratio allow (REJECT), or was not timed (HOLD) | REJECT, HOLD |
| cost | tuning cost more than max_cost (REJECT), or the cost is not known (HOLD) | REJECT, HOLD |
| approval | a person was asked, and refused or did not answer in time | HOLD |

Every gate is evaluated and listed. A gate that could not be evaluated has failed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from retune.ceilings import checks_gate, cost_gate, latency_gate
from retune.config import Splits
from retune.errors import BadInputError, RetuneError
from retune.evaluation.comparison import ROUNDING, measurably_better, paired_bootstrap
from retune.evaluation.metrics import metric_named
from retune.evaluation.predictions import rows_sha256
from retune.gates import Side, changed, figure, finite, listed, margin, negative_flips, signed, slice_floor, slices
from retune.policy import Policy
from retune.records import CheckResult, Comparison, Decision, Evaluation, Gate, Measured, Verdict

__all__ = ["Side", "decide", "with_answer"]

T = TypeVar("T")


def decide(
    candidate: Side,
    champion: Side,
    policy: Policy,
    labels: Sequence[str],
    *,
    barred: bool,
    same_release: bool,
    spent: float = 0.0,
    seed: int = 0,
    measured: Mapping[str, Measured] | None = None,
    checks: Sequence[CheckResult] | None = None,
) -> Decision:
    """Verdict of the gate, with every gate and the reasons for a person, the weightiest first.

    `labels`: today's, in the prompt's order; empty for task: generation. `barred`: whether the candidate was rolled back and not
    unbarred. `same_release`: whether the candidate is the champion. `spent`: chance of a promotion by luck that the ledger's other
    comparisons on this test split have used up. `seed` draws the resamples. `measured`: role -> what was timed and what tuning cost.
    `checks`: what became of the prompt's checks on the candidate; None without a file of them, empty where none was run. Fails closed:
    whatever goes wrong inside a gate is that gate's failure, never a promotion.
    """
    new_base = candidate.base_model != champion.base_model
    if new_base and policy.metric == "perplexity":  # tokens of another tokenizer are no common measure, bytes are
        policy = policy.model_copy(update={"metric": "perplexity_per_byte"})
    ours, theirs = candidate.evaluation, champion.evaluation
    compared = _attempt(
        "gain",
        lambda: paired_bootstrap(
            candidate.predictions, champion.predictions, policy.metric, labels, policy.look_confidence, policy.resamples, seed
        ),
    )
    attempts: list[tuple[str, Callable[[], Gate]]] = [
        ("different_release", partial(_different_release, candidate, same_release)),
        ("not_barred", partial(_not_barred, candidate, barred)),
        ("same_test_rows", partial(_same_test_rows, candidate, champion)),
        ("complete", partial(_complete, ours, theirs, policy)),
        ("same_splits", partial(_same_splits, candidate.splits, champion.splits)),
        ("looks", partial(_looks, spent, policy)),
        ("gain", partial(_gain, compared, ours, theirs, policy.min_gain)),
        *((f"floors.{name}", partial(_floor, ours, name, floor)) for name, floor in policy.floors.items()),
        *(
            (f"margins.{name}", partial(margin, candidate, champion, name, largest, policy, labels, seed))
            for name, largest in policy.margins.items()
        ),
        *(
            (f"slice_floors.{name}", partial(slice_floor, candidate, name, floor, policy, labels, seed))
            for name, floor in policy.slice_floors.items()
        ),
        ("slices", partial(slices, candidate, champion, policy, labels, seed)),
        ("negative_flips", partial(negative_flips, candidate, champion, policy, labels)),
        *((f"max_changed.{name}", partial(changed, ours, name, largest, policy)) for name, largest in policy.max_changed.items()),
    ]
    if not same_release:  # else nothing was measured
        attempts += [
            ("checks", partial(checks_gate, checks)),
            ("latency", partial(latency_gate, measured, policy)),
            ("cost", partial(cost_gate, measured, policy)),
        ]
    gates = [_attempt(name, attempt) for name, attempt in attempts]
    verdict = _verdict(gates)
    return Decision(
        verdict=verdict,
        reasons=[*_reasons(gates, verdict), *_notes(candidate, champion, policy)],
        gates=[gate.to_json() for gate in gates],
        comparison=compared.to_json() if isinstance(compared, Comparison) else None,
        ask=new_base,
    )


def with_answer(decision: Decision, approved: bool, reason: str) -> Decision:
    """A PROMOTE after a person was asked: it stands, or becomes a HOLD for this reason."""
    gate = Gate("approval", approved, reason, on_fail="HOLD")
    return replace(
        decision,
        verdict=decision.verdict if approved else "HOLD",
        reasons=[*decision.reasons, reason] if approved else [reason, *decision.reasons],
        gates=[*decision.gates, gate.to_json()],
    )


def _attempt(name: str, check: Callable[[], T]) -> T | Gate:
    """The result of a check, or a failed gate that says why there is none."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001  whatever fails here must refuse the promotion, and leave a decision to read
        kind = "" if isinstance(error, RetuneError) else f"{type(error).__name__}: "
        return Gate(name, False, f"{name} could not be checked: {kind}{error}.", on_fail="HOLD")


def _verdict(gates: Sequence[Gate]) -> Verdict:
    failed = {gate.on_fail for gate in gates if not gate.passed}
    if not failed:
        return "PROMOTE"
    return "REJECT" if "REJECT" in failed else "HOLD"


def _reasons(gates: Sequence[Gate], verdict: Verdict) -> list[str]:
    """Failed gates, those that reject first, then the gain."""
    failed = sorted((gate for gate in gates if not gate.passed), key=lambda gate: gate.on_fail != "REJECT")
    gain = [gate.reason for gate in gates if gate.name == "gain" and gate.passed]
    return [*(gate.reason for gate in failed), *gain] if verdict != "PROMOTE" else gain


def _notes(candidate: Side, champion: Side, policy: Policy) -> Iterator[str]:
    """What decides nothing and a person should know."""
    if candidate.base_model != champion.base_model:
        models = f"{candidate.base_model[:12]} for the candidate, {champion.base_model[:12]} for the champion"
        yield f"The base model differs: {models}; a person must approve."
    if policy.max_slice_gap is not None:
        small = [
            f"{column}={value} ({figures.get('rows', 0):.0f})"
            for column, values in candidate.evaluation.slices.items()
            for value, figures in values.items()
            if figures.get("rows", 0) < policy.min_slice_rows
        ]
        if small:
            yield f"Not guarded, with fewer than {policy.min_slice_rows} test rows: {listed(small)}."


def _different_release(candidate: Side, same_release: bool) -> Gate:
    name = candidate.evaluation.release[:12]
    reason = f"The candidate {name} is the champion itself." if same_release else f"The candidate {name} is not the champion."
    return Gate("different_release", not same_release, reason)


def _not_barred(candidate: Side, barred: bool) -> Gate:
    name = candidate.evaluation.release[:12]
    reason = f"The release {name} was rolled back; unbar it to allow it again." if barred else f"The release {name} is not barred."
    return Gate("not_barred", not barred, reason)


def _same_test_rows(candidate: Side, champion: Side) -> Gate:
    ours, theirs = candidate.evaluation, champion.evaluation
    differing = []
    if ours.rows != theirs.rows:
        differing.append(f"{ours.rows:,} and {theirs.rows:,} rows")
    if ours.test_sha256 != theirs.test_sha256:
        differing.append(f"test rows {ours.test_sha256[:12]} and {theirs.test_sha256[:12]}")
    if ours.evaluator != theirs.evaluator:
        differing.append(f"evaluation code {ours.evaluator[:12]} and {theirs.evaluator[:12]}")
    for role, side in (("candidate", candidate), ("champion", champion)):
        if rows_sha256(side.predictions) != side.evaluation.test_sha256:
            differing.append(f"predictions of the {role} that its figures were not made from")
    if differing:
        reason = f"The two releases were not measured alike: {'; '.join(differing)}. Evaluate both again."
    else:
        reason = f"Both releases were measured on the same {ours.rows:,} test rows by the same code."
    return Gate("same_test_rows", not differing, reason)


def _complete(candidate: Evaluation, champion: Evaluation, policy: Policy) -> Gate:
    policed = [policy.metric, *policy.floors, *policy.margins]
    ours = _incomplete(candidate, [*champion.metrics, *policed])
    theirs = _incomplete(champion, [*candidate.metrics, *policed])
    if ours:
        return Gate("complete", False, f"The candidate's figures are not complete: {', '.join(ours)}.", on_fail="REJECT")
    if theirs:
        return Gate("complete", False, f"The champion's figures are not complete: {', '.join(theirs)}. Evaluate it again.")
    return Gate("complete", True, f"All {len(candidate.metrics)} metrics of both releases are finite numbers.", on_fail="REJECT")


def _incomplete(evaluation: Evaluation, names: Sequence[str]) -> list[str]:
    problems = []
    for name in dict.fromkeys(names):
        if name not in evaluation.metrics:
            problems.append(f"{name} is missing")
        elif not math.isfinite(evaluation.metrics[name]):
            problems.append(f"{name} is {evaluation.metrics[name]}")
    return problems


def _same_splits(candidate: Splits | None, champion: Splits | None) -> Gate:
    if champion is None:
        return Gate("same_splits", True, "The champion was tuned on no rows.")
    if candidate is None:
        return Gate("same_splits", False, "The candidate's splits are not known, so the champion may have been tuned on today's test rows.")
    ours, theirs = (_split_words(splits) for splits in (candidate, champion))
    if candidate == champion:
        return Gate("same_splits", True, f"Both releases were tuned with the splits {ours}.")
    return Gate(
        "same_splits",
        False,
        f"The splits changed from {theirs} to {ours} (train/validation/test), so the champion may have been tuned on today's test rows. "
        "Go back to its splits, or roll back to the template alone first.",
    )


def _split_words(splits: Splits) -> str:
    salt = f", salt {splits.salt}" if splits.salt else ""
    return "/".join(f"{share:g}" for share in (splits.train, splits.validation, splits.test)) + salt


def _looks(spent: float, policy: Policy) -> Gate:
    allowed, own = 1 - policy.confidence, 1 - policy.look_confidence
    passed = spent + own <= allowed + ROUNDING
    used = (
        f"Other comparisons on this test split have used up {100 * spent:.2g} of the {100 * allowed:.3g} % chance of luck that confidence "
    )
    if passed:
        reason = f"{used}{policy.confidence:g} leaves; this one takes {100 * own:.2g} %."
    else:
        reason = (
            f"{used}{policy.confidence:g} leaves; one more, which takes {100 * own:.2g} %, could promote by luck. Draw a new test "
            "split with preprocess.splits.salt: any other word; then roll back to the template alone: the champion "
            "was tuned on rows of it."
        )
    return Gate("looks", passed, reason, finite(spent), allowed)


def _gain(compared: Comparison | Gate, candidate: Evaluation, champion: Evaluation, min_gain: float) -> Gate:
    if isinstance(compared, Gate):
        return compared
    for role, evaluation, value in (("candidate", candidate, compared.candidate), ("champion", champion, compared.champion)):
        stated = evaluation.metrics.get(compared.metric, math.nan)
        if not abs(stated - value) <= ROUNDING:
            raise BadInputError(
                f"{compared.metric} of the {role} is {figure(stated)} in its figures and {figure(value)} in its predictions"
            )
    low, high, gain = compared.low, compared.high, compared.gain
    distinct, enough, worse = low > ROUNDING, gain >= min_gain - ROUNDING, high < -ROUNDING
    figures = (
        f"{figure(compared.candidate)} against {figure(compared.champion)} on {compared.rows:,} rows, a gain of {signed(gain)} "
        f"(from {signed(low)} to {signed(high)}, each end at {100 * compared.confidence:.4g} % confidence)"
    )
    if distinct and enough:
        reason = f"{compared.metric} is measurably better: {figures}."
    elif distinct:
        reason = f"{compared.metric} is measurably better, by less than the min_gain of {figure(min_gain)}: {figures}."
    elif worse:
        reason = f"{compared.metric} is measurably worse: {figures}."
    else:
        short = "" if enough else f", and the gain is less than the min_gain of {figure(min_gain)}"
        reason = f"{compared.metric} cannot be told from the champion's{short}: {figures}."
    return Gate(
        "gain", measurably_better(low, gain, min_gain), reason, gain, finite(min_gain), low, high, on_fail="REJECT" if worse else "HOLD"
    )


def _floor(candidate: Evaluation, name: str, floor: float) -> Gate:
    metric = metric_named(name)
    value = candidate.metrics.get(name, math.nan)
    passed = metric.sign * (value - floor) >= -ROUNDING
    bound = "least" if metric.higher_is_better else "greatest"
    outcome = "which meets" if passed else "which misses"
    reason = f"{name} is {figure(value)}, {outcome} its floor: the {bound} allowed is {figure(floor)}."
    return Gate(f"floors.{name}", passed, reason, finite(value), finite(floor), on_fail="REJECT")
