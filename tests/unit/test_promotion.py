import copy
import inspect
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from retune import promotion
from retune.config import Prompt, Splits, canonical_json
from retune.evaluation.metrics import evaluate
from retune.ledger import Entry, spent_before
from retune.policy import Policy
from retune.promotion import Side, decide, with_answer
from retune.records import CheckResult, Gate, Measured
from retune.tasks.verdict import look_of

LABELS = ["low", "medium", "high"]
PROMPT = Prompt.model_validate(
    {
        "name": "ticket_priority",
        "task": "classification",
        "base_model": {"path": "examples/base_model", "sha256": "0" * 64},
        "source": "examples/landing/ticket_priority",
        "template": "Ticket: {text}\nPriority:",
        "target": "label",
        "labels": {label: f" {label}" for label in LABELS},
        "slices": ["channel"],
    }
)
ONE_LOOK = {"resamples": 200, "looks_per_test_split": 1}
POLICY = Policy(metric="accuracy", **ONE_LOOK)
RANK = {"REJECT": 0, "HOLD": 1, "PROMOTE": 2}


def side(target, prediction, release="a" * 64, channel=None, splits=Splits(), base_model="b" * 64, evaluator="e" * 64):  # noqa: B008  frozen
    """One release from label codes; row n has the channel `web` if n is even, else `mail`."""
    rows = len(target)
    chances = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]])[list(prediction)]
    frame = pd.DataFrame(
        {
            "id": [f"row-{row}" for row in range(rows)],
            "group": range(rows),
            "channel": channel or ["web" if row % 2 == 0 else "mail" for row in range(rows)],
            "target": [LABELS[code] for code in target],
            "prediction": [LABELS[code] if code >= 0 else None for code in prediction],
            **{f"p_{label}": chances[:, k] for k, label in enumerate(LABELS)},
        }
    )
    return Side(evaluate(frame, PROMPT, release, evaluator), frame, splits, base_model)


def judge(candidate, champion, policy=POLICY, barred=False, same_release=False, spent=0.0, **found):
    decision = decide(candidate, champion, policy, LABELS, barred=barred, same_release=same_release, spent=spent, **found)
    canonical_json(decision.to_json())  # what the ledger writes: no NaN, plain JSON
    return decision


def gate(decision, name):
    (found,) = [each for each in decision.gates if each["name"] == name]
    return found


def failed(decision):
    return [each["name"] for each in decision.gates if not each["passed"]]


TARGET = [0, 1, 2, 0] * 25
# 90 and 70 of 100 rows right; the champion's errors are spread over both channels.
BETTER = [(code + 1) % 3 if row < 10 else code for row, code in enumerate(TARGET)]
WORSE = [(code + 1) % 3 if row < 30 else code for row, code in enumerate(TARGET)]


@pytest.fixture
def candidate():
    return side(TARGET, BETTER)


@pytest.fixture
def champion():
    return side(TARGET, WORSE, release="c" * 64)


def with_metrics(of, **metrics):
    return replace(of, evaluation=replace(of.evaluation, metrics={**of.evaluation.metrics, **metrics}))


def without_metric(of, name):
    return replace(of, evaluation=replace(of.evaluation, metrics={k: v for k, v in of.evaluation.metrics.items() if k != name}))


def test_a_measurably_better_candidate_is_promoted_with_its_gain_first(candidate, champion):
    decision = judge(candidate, champion)
    assert decision.verdict == "PROMOTE"
    assert failed(decision) == []
    assert decision.reasons[0].startswith("accuracy is measurably better: 0.9000 against 0.7000 on 100 rows, a gain of +0.2000 (from +0.1")
    assert [each["name"] for each in decision.gates] == [
        "different_release",
        "not_barred",
        "same_test_rows",
        "complete",
        "same_splits",
        "looks",
        "gain",
        "slices",
        "negative_flips",
        "checks",
        "latency",
        "cost",
    ]
    gain = gate(decision, "gain")
    assert gain["value"] == pytest.approx(0.2)
    assert (gain["threshold"], gain["low"], gain["high"]) == (0, decision.comparison["low"], decision.comparison["high"])


def test_a_measurably_worse_candidate_is_rejected(candidate, champion):
    decision = judge(champion, candidate)
    assert decision.verdict == "REJECT"
    assert decision.reasons[0].startswith("accuracy is measurably worse: 0.7000 against 0.9000 on 100 rows, a gain of -0.2000")


def test_a_candidate_that_cannot_be_told_apart_is_held(candidate):
    """Each release is right on 10 rows that the other gets wrong."""
    other = [(code + 1) % 3 if 10 <= row < 20 else code for row, code in enumerate(TARGET)]
    decision = judge(side(TARGET, other), candidate)
    assert (decision.verdict, failed(decision)) == ("HOLD", ["gain"])
    assert decision.reasons[0].startswith("accuracy cannot be told from the champion's: 0.9000 against 0.9000")


def test_a_gain_below_min_gain_is_held_and_says_so(candidate, champion):
    decision = judge(candidate, champion, POLICY.model_copy(update={"min_gain": 0.25}))
    assert (decision.verdict, failed(decision)) == ("HOLD", ["gain"])
    assert "measurably better, by less than the min_gain of 0.2500: 0.9000 against 0.7000" in decision.reasons[0]


def test_a_gain_of_exactly_min_gain_is_enough(candidate, champion):
    assert candidate.evaluation.metrics["accuracy"] - champion.evaluation.metrics["accuracy"] != 0.2  # off by rounding
    assert judge(candidate, champion, POLICY.model_copy(update={"min_gain": 0.2})).verdict == "PROMOTE"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"test_sha256": "0" * 64}, "test rows 000000000000 and"),
        ({"rows": 99}, "99 and 100 rows"),
        ({"evaluator": "f" * 64}, "evaluation code ffffffffffff and eeeeeeeeeeee"),
    ],
)
def test_releases_measured_differently_are_held(candidate, champion, change, text):
    decision = judge(replace(candidate, evaluation=replace(candidate.evaluation, **change)), champion)
    assert (decision.verdict, failed(decision)) == ("HOLD", ["same_test_rows"])
    assert text in decision.reasons[0]


def test_predictions_of_other_rows_than_the_figures_are_held(candidate, champion):
    fewer = side(TARGET[:90], BETTER[:90])
    decision = judge(replace(candidate, predictions=fewer.predictions), champion)
    assert decision.verdict == "HOLD"
    assert "predictions of the candidate that its figures were not made from" in gate(decision, "same_test_rows")["reason"]
    assert "gain could not be checked: both releases must be evaluated on the same test rows" in gate(decision, "gain")["reason"]


def test_predictions_that_contradict_the_figures_are_held(candidate, champion):
    decision = judge(replace(candidate, predictions=side(TARGET, TARGET).predictions), champion)
    assert (decision.verdict, failed(decision)) == ("HOLD", ["gain"])
    assert "accuracy of the candidate is 0.9000 in its figures and 1.0000 in its predictions" in decision.reasons[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_rejects_the_candidate(candidate, champion, value):
    decision = judge(with_metrics(candidate, log_loss=value), champion)
    assert (decision.verdict, failed(decision)) == ("REJECT", ["complete"])
    assert decision.reasons[0] == f"The candidate's figures are not complete: log_loss is {value}."


def test_a_missing_metric_rejects_the_candidate_and_holds_for_the_champion(candidate, champion):
    decision = judge(without_metric(candidate, "log_loss"), champion)
    assert (decision.verdict, failed(decision)) == ("REJECT", ["complete"])
    decision = judge(candidate, without_metric(champion, "log_loss"))
    assert (decision.verdict, failed(decision)) == ("HOLD", ["complete"])


def test_a_policy_with_a_metric_that_nobody_computes_never_promotes(candidate, champion):
    decision = judge(candidate, champion, POLICY.model_copy(update={"metric": "rouge"}))
    assert decision.verdict == "REJECT"
    assert "gain could not be checked: metric must be one of accuracy," in gate(decision, "gain")["reason"]
    assert decision.comparison is None


def test_a_look_has_its_share_of_the_confidence_and_the_last_one_ends_the_test_split(candidate, champion):
    policy = Policy(metric="accuracy", looks_per_test_split=10)
    decision = judge(candidate, champion, policy, spent=9 * 0.005)
    assert decision.verdict == "PROMOTE"
    assert decision.comparison["confidence"] == pytest.approx(0.995)
    assert decision.comparison["p_better"] <= 0.005
    assert "each end at 99.5 % confidence" in decision.reasons[0]
    used = (
        "Other comparisons on this test split have used up 4.5 of the 5 % chance of luck that confidence 0.95 leaves; this one takes 0.5 %."
    )
    assert gate(decision, "looks")["reason"] == used
    spent = judge(candidate, champion, policy, spent=10 * 0.005)
    assert (spent.verdict, failed(spent)) == ("HOLD", ["looks"])
    assert "preprocess.splits.salt" in spent.reasons[0]
    more = judge(candidate, champion, Policy(metric="accuracy", looks_per_test_split=52), spent=10 * 0.005)
    assert failed(more) == ["looks"], "another number of looks gives nothing back"


def test_splits_under_another_salt_are_other_splits(candidate, champion):
    decision = judge(candidate, replace(champion, splits=Splits(salt="2027")))
    assert failed(decision) == ["same_splits"]
    assert "from 0.6/0.15/0.25, salt 2027 to 0.6/0.15/0.25 " in gate(decision, "same_splits")["reason"]


def test_other_splits_are_held_with_a_way_out(candidate, champion):
    moved = replace(champion, splits=Splits(train=0.7, validation=0.1, test=0.2))
    decision = judge(candidate, moved)
    assert (decision.verdict, failed(decision)) == ("HOLD", ["same_splits"])
    assert "changed from 0.7/0.1/0.2 to 0.6/0.15/0.25" in decision.reasons[0]


def test_the_template_alone_has_no_splits_to_differ(candidate, champion):
    assert judge(candidate, replace(champion, splits=None)).verdict == "PROMOTE"
    assert judge(replace(candidate, splits=None), champion).verdict == "HOLD"


@pytest.mark.parametrize(
    ("floors", "names"),
    [
        ({"accuracy": 0.9, "log_loss": 10.0}, []),
        ({"accuracy": 0.901}, ["floors.accuracy"]),
        ({"log_loss": 0.1, "macro_f1": 0.5}, ["floors.log_loss"]),
        ({"accuracy": float("nan")}, ["floors.accuracy"]),
    ],
)
def test_a_metric_beyond_its_floor_is_rejected_lower_better_included(candidate, champion, floors, names):
    decision = judge(candidate, champion, Policy(metric="accuracy", **ONE_LOOK, floors=floors))
    assert (decision.verdict, failed(decision)) == ("REJECT" if names else "PROMOTE", names)


def test_an_unknown_floor_never_promotes(candidate, champion):
    decision = judge(candidate, champion, Policy(metric="accuracy", **ONE_LOOK).model_copy(update={"floors": {"bleu": 0.1}}))
    assert (decision.verdict, failed(decision)) == ("REJECT", ["complete", "floors.bleu"])


def sliced(mail_right):
    """100 rows; of the 50 in `mail` the candidate has so many right, of the 50 in `web` all; the champion 40 and 20."""
    target = [0] * 100
    champion = [0 if (row // 2 < 40 if row % 2 else row // 2 < 20) else 1 for row in range(100)]
    candidate = [0 if row % 2 == 0 or row // 2 < mail_right else 1 for row in range(100)]
    return side(target, candidate), side(target, champion, release="c" * 64)


@pytest.mark.parametrize(("mail_right", "passed"), [(35, True), (34, False)])
def test_a_slice_may_fall_by_max_slice_gap_and_no_more(mail_right, passed):
    decision = judge(*sliced(mail_right), Policy(metric="accuracy", **ONE_LOOK, max_slice_gap=0.1))
    assert decision.verdict == ("PROMOTE" if passed else "REJECT")
    assert gate(decision, "slices")["value"] == pytest.approx(0.8 - mail_right / 50)
    if not passed:
        assert decision.reasons[0] == "accuracy gets worse by more than 0.1000 in channel=mail (0.8000 to 0.6800, 50 rows)."


def test_a_slice_of_few_rows_is_named_and_not_guarded():
    policy = Policy(metric="accuracy", **ONE_LOOK, max_slice_gap=0.1, min_slice_rows=51)
    decision = judge(*sliced(30), policy)
    assert decision.verdict == "PROMOTE"
    assert decision.reasons[1] == "Not guarded, with fewer than 51 test rows: channel=mail (50), channel=web (50)."
    assert gate(decision, "slices")["reason"] == "No slice or set has the 51 rows from which it is guarded."


@pytest.mark.parametrize("gap", [None, 0.5])
def test_a_missing_slice_rejects_the_candidate_and_holds_for_the_champion(candidate, champion, gap):
    policy = POLICY.model_copy(update={"max_slice_gap": gap})

    def without_mail(of):
        return replace(of, evaluation=replace(of.evaluation, slices={"channel": {"web": of.evaluation.slices["channel"]["web"]}}))

    decision = judge(without_mail(candidate), champion, policy)
    assert (decision.verdict, failed(decision)) == ("REJECT", ["slices"])
    assert decision.reasons[0] == "The candidate has no accuracy for channel=mail."
    decision = judge(candidate, without_mail(champion), policy)
    assert (decision.verdict, failed(decision)) == ("HOLD", ["slices"])


def test_a_rolled_back_release_and_the_champion_itself_are_held(candidate, champion):
    decision = judge(candidate, champion, barred=True)
    assert (decision.verdict, failed(decision)) == ("HOLD", ["not_barred"])
    assert decision.reasons[0] == "The release aaaaaaaaaaaa was rolled back; unbar it to allow it again."
    decision = judge(candidate, champion, same_release=True)
    assert (decision.verdict, failed(decision)) == ("HOLD", ["different_release"])


@pytest.mark.parametrize(("approved", "verdict"), [(True, "PROMOTE"), (False, "HOLD")])
def test_a_persons_answer_is_a_gate_of_its_own(candidate, champion, approved, verdict):
    before = judge(candidate, champion)
    after = with_answer(before, approved, "said anna")
    assert (before.verdict, after.verdict) == ("PROMOTE", verdict)
    assert after.gates[:-1] == before.gates
    assert (after.gates[-1]["name"], after.gates[-1]["passed"], after.gates[-1]["reason"]) == ("approval", approved, "said anna")
    assert sorted(after.reasons) == sorted([*before.reasons, "said anna"])
    assert approved or after.reasons[0] == "said anna", "what held it comes first"


def test_every_gate_is_listed_and_rejections_come_first(candidate, champion):
    moved = replace(champion, splits=None, evaluation=replace(champion.evaluation, evaluator="f" * 64), base_model="d" * 64)
    policy = Policy(metric="accuracy", **ONE_LOOK, floors={"accuracy": 0.99}, min_gain=0.5)
    decision = judge(candidate, moved, policy, barred=True)
    assert decision.verdict == "REJECT"
    assert failed(decision) == ["not_barred", "same_test_rows", "gain", "floors.accuracy"]
    assert len(decision.gates) == 13
    assert decision.reasons[0] == "accuracy is 0.9000, which misses its floor: the least allowed is 0.9900."
    assert (
        decision.reasons[-1]
        == "The base model differs: bbbbbbbbbbbb for the candidate, dddddddddddd for the champion; a person must approve."
    )


MEASURED = Measured(8.0, 10.0, 3000.0, 2560, 1800.0, 2.0)
PASSED = CheckResult("outage", True, True, "Expected 'high'; got 'high'.")
CEILINGS = POLICY.model_copy(update={"max_latency_ms": 50.0, "max_latency_ratio": 1.5, "max_cost": 3.0})


@pytest.mark.parametrize(
    ("change", "checks", "verdict", "names"),
    [
        ({}, [PASSED], "PROMOTE", []),
        ({}, [replace(PASSED, passed=False)], "REJECT", ["checks"]),
        ({}, [replace(PASSED, passed=False, required=False)], "PROMOTE", []),
        ({}, [], "HOLD", ["checks"]),
        ({"latency_p95_ms": 51.0}, None, "REJECT", ["latency"]),
        ({"latency_p95_ms": 15.1}, None, "REJECT", ["latency"]),
        ({"latency_p95_ms": float("nan")}, None, "HOLD", ["latency"]),
        ({"cost": 3.01}, None, "REJECT", ["cost"]),
        ({"cost": None}, None, "HOLD", ["cost"]),
        ({"tune_seconds": float("nan"), "cost": None}, None, "HOLD", ["cost"]),
        ({"latency_p95_ms": None}, None, "HOLD", ["latency"]),
        ({"latency_p95_ms": "fast", "cost": "little"}, None, "HOLD", ["latency", "cost"]),
    ],
)
def test_a_better_candidate_must_pass_its_checks_and_stay_below_the_ceilings(candidate, champion, change, checks, verdict, names):
    measured = {"candidate": replace(MEASURED, **change), "champion": MEASURED}
    decision = judge(candidate, champion, CEILINGS, measured=measured, checks=checks)
    assert (decision.verdict, failed(decision)) == (verdict, names)
    assert not names or decision.reasons[0] == gate(decision, names[0])["reason"]


def test_ceilings_with_nothing_measured_are_held_with_the_way_out(candidate, champion):
    decision = judge(candidate, champion, CEILINGS)
    assert (decision.verdict, failed(decision)) == ("HOLD", ["latency", "cost"])
    assert decision.reasons[0].startswith("latency could not be checked: nothing was measured of the candidate; run task measure again")


IN_GATES = ["paired_bootstrap", "rows_sha256", "metric_named", "slices", "negative_flips", "checks_gate", "latency_gate", "cost_gate"]


@pytest.mark.parametrize("name", IN_GATES)
def test_an_exception_inside_a_gate_is_a_refusal_with_its_message(candidate, champion, monkeypatch, name):
    def broken(*args):
        raise ZeroDivisionError("the cable is out")

    monkeypatch.setattr(promotion, name, broken)
    decision = judge(candidate, champion, POLICY.model_copy(update={"floors": {"accuracy": 0.5}}))
    assert decision.verdict == "HOLD"
    assert any("could not be checked: ZeroDivisionError: the cable is out." in reason for reason in decision.reasons)


codes = st.integers(0, 2)
rows = st.lists(st.tuples(codes, st.integers(-1, 2), st.integers(-1, 2)), min_size=1, max_size=40)
metrics = st.sampled_from(["accuracy", "macro_f1", "weighted_f1", "log_loss"])


@settings(max_examples=30, deadline=None)
@given(table=rows, metric=metrics)
def test_identical_predictions_are_never_promoted(table, metric):
    target, prediction, _ = zip(*table, strict=True)
    decision = judge(side(target, prediction), side(target, prediction, release="c" * 64), Policy(metric=metric, resamples=100))
    assert decision.verdict == "HOLD"
    assert failed(decision) == ["gain"]


@settings(max_examples=30, deadline=None)
@given(table=rows, metric=metrics)
def test_a_candidate_with_a_worse_figure_is_never_promoted(table, metric):
    target, ours, theirs = zip(*table, strict=True)
    decision = judge(side(target, ours), side(target, theirs, release="c" * 64), Policy(metric=metric, resamples=100))
    if decision.comparison["gain"] <= 0:
        assert decision.verdict != "PROMOTE"


@settings(max_examples=30, deadline=None)
@given(data=st.data(), right=st.integers(60, 100))
def test_nothing_broken_is_promoted_however_good_the_rest(data, right):
    """Starts from a promotion and breaks one thing."""
    good = side(TARGET, [code if row < right else (code + 1) % 3 for row, code in enumerate(TARGET)])
    poor = side(TARGET, [(code + 1) % 3 if row < 55 else code for row, code in enumerate(TARGET)], release="c" * 64)
    assume(judge(good, poor).verdict == "PROMOTE")
    name = data.draw(st.sampled_from(sorted(good.evaluation.metrics)))
    kind = data.draw(st.sampled_from(["nan", "missing", "rows", "order", "probability", "slice"]))
    if kind == "nan":
        good = with_metrics(good, **{name: data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))})
    elif kind == "missing":
        good = without_metric(good, name)
    elif kind == "rows":
        kept = data.draw(st.integers(60, 99))
        good = side(TARGET[:kept], TARGET[:kept])
    elif kind == "order":
        shuffled = good.predictions.iloc[::-1]
        good = replace(good, evaluation=evaluate(shuffled, PROMPT, "a" * 64, "e" * 64), predictions=shuffled)
    elif kind == "probability":
        broken = good.predictions.assign(p_low=float("nan"))
        good = replace(good, evaluation=evaluate(broken, PROMPT, "a" * 64, "e" * 64), predictions=broken)
    else:
        good = replace(good, evaluation=replace(good.evaluation, slices={}))
    assert judge(good, poor).verdict != "PROMOTE"


@settings(max_examples=40, deadline=None)
@given(
    table=st.lists(st.tuples(codes, st.integers(-1, 2), st.integers(-1, 2)), min_size=20, max_size=60),
    metric=st.sampled_from(["accuracy", "macro_f1", "weighted_f1"]),
    fixed=st.sets(st.integers(0, 59)),
)
def test_answering_more_rows_rightly_never_lowers_the_verdict(table, metric, fixed):
    target, ours, theirs = zip(*table, strict=True)
    # A bias towards the candidate, so that promotions occur.
    ours = [right if row % 2 else said for row, (right, said) in enumerate(zip(target, ours, strict=True))]
    repaired = [target[row] if row in fixed else said for row, said in enumerate(ours)]
    policy = Policy(metric=metric, resamples=100, floors={"accuracy": 0.5}, max_slice_gap=0.1, min_slice_rows=10)
    champion = side(target, theirs, release="c" * 64)
    before, after = (judge(side(target, said), champion, policy) for said in (ours, repaired))
    assert RANK[after.verdict] >= RANK[before.verdict]
    assert after.comparison["low"] >= before.comparison["low"]


def in_figures(role, value, *, slices=False):
    """Changes one side's accuracy, over all rows or in one slice."""

    def change(sides):
        old = sides[role].evaluation
        if slices:
            web = {**old.slices["channel"]["web"], "accuracy": value}
            new = replace(old, slices={"channel": {**old.slices["channel"], "web": web}})
        else:
            new = replace(old, metrics={**old.metrics, "accuracy": value})
        return {**sides, role: replace(sides[role], evaluation=new)}

    return change


def in_evaluation(role, **fields):
    return lambda sides: {**sides, role: replace(sides[role], evaluation=replace(sides[role].evaluation, **fields))}


def in_side(role, **fields):
    return lambda sides: {**sides, role: replace(sides[role], **fields)}


def in_policy(**fields):
    return lambda sides: {**sides, "policy": sides["policy"].model_copy(update=fields)}


NAN, INFINITE = float("nan"), float("inf")
ROLES = ("candidate", "champion")
EVERY_GATE = Policy(metric="accuracy", **ONE_LOOK, floors={"accuracy": 0.5}, max_slice_gap=0.5, min_slice_rows=10)
"""A policy that asks for one of each gate."""
BREAKAGES = {
    **{f"{role}'s accuracy is {value}": in_figures(role, value) for role in ROLES for value in (NAN, INFINITE, -INFINITE, None, "0.9")},
    **{f"{role}'s accuracy in a slice is {value}": in_figures(role, value, slices=True) for role in ROLES for value in (NAN, None, "0.9")},
    **{f"{role} has no metrics": in_evaluation(role, metrics={}) for role in ROLES},
    **{f"{role} has no slices": in_evaluation(role, slices={}) for role in ROLES},
    **{f"{role}'s test rows are not known": in_evaluation(role, test_sha256=None) for role in ROLES},
    **{f"{role}'s evaluator is not known": in_evaluation(role, evaluator=None) for role in ROLES},
    **{f"{role} has no predictions": in_side(role, predictions=None) for role in ROLES},
    **{f"{role}'s predictions have no rows": in_side(role, predictions=pd.DataFrame()) for role in ROLES},
    "the candidate's splits are not known": in_side("candidate", splits=None),
    "what is spent is no number": lambda sides: {**sides, "spent": NAN},
    "what is spent is without end": lambda sides: {**sides, "spent": INFINITE},
    **{f"min_gain is {value}": in_policy(min_gain=value) for value in (NAN, INFINITE)},
    **{f"a floor is {value}": in_policy(floors={"accuracy": value}) for value in (NAN, INFINITE, None)},
    **{f"max_slice_gap is {value}": in_policy(max_slice_gap=value) for value in (NAN, "wide")},
    **{f"confidence is {value}": in_policy(confidence=value) for value in (NAN, INFINITE, None)},
    "a metric that nobody computes": in_policy(metric="rouge"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_no_input_that_is_broken_is_ever_promoted(candidate, champion, breakage):
    """Starts from a promotion; a decision there must be, to be read, and never an exception."""
    sides = {"candidate": candidate, "champion": champion, "policy": EVERY_GATE, "labels": LABELS, "barred": False, "same_release": False}
    assert decide(**sides).verdict == "PROMOTE"
    decision = decide(**BREAKAGES[breakage](sides))
    assert decision.verdict != "PROMOTE"
    assert failed(decision)
    assert decision.reasons


def test_whatever_fails_in_whichever_gate_is_never_a_promotion(candidate, champion, monkeypatch):
    """Every function of the module that makes a gate raises in its turn."""
    makers = [name for name, of in inspect.getmembers(promotion, inspect.isfunction) if inspect.signature(of).return_annotation is Gate]
    whole = judge(candidate, champion, EVERY_GATE)
    assert whole.verdict == "PROMOTE"
    asked = []
    for name in makers:
        with monkeypatch.context() as patched:

            def broken(*args, name=name, **named):
                asked.append(name)
                raise OSError(f"no more {name}")

            patched.setattr(promotion, name, broken)
            decision = judge(candidate, champion, EVERY_GATE)
        if name in asked:
            assert decision.verdict == "HOLD", name
            assert len(failed(decision)) == 1
            assert decision.reasons[0].endswith(f"could not be checked: OSError: no more {name}.")
            assert len(decision.gates) == len(whole.gates)
    assert len(set(asked)) == len(whole.gates), "each gate of the decision was broken once"


@settings(max_examples=30, deadline=None)
@given(table=rows, metric=metrics, spent=st.floats(0, 0.1), barred=st.booleans())
def test_the_same_inputs_give_the_same_decision_and_are_left_as_they_were(table, metric, spent, barred):
    target, ours, theirs = zip(*table, strict=True)
    sides = side(target, ours), side(target, theirs, release="c" * 64)
    policy = Policy(metric=metric, resamples=100, floors={"accuracy": 0.5}, max_slice_gap=0.1, min_slice_rows=5)
    before = copy.deepcopy(sides)
    np.random.seed(0)
    first = judge(*sides, policy, barred, spent=spent)
    np.random.seed(1)  # nothing is drawn from what others may have seeded
    assert judge(*copy.deepcopy(before), policy.model_copy(deep=True), barred, spent=spent) == first
    for left, was in zip(sides, before, strict=True):
        pd.testing.assert_frame_equal(left.predictions, was.predictions)
        assert (left.evaluation, left.splits, left.base_model) == (was.evaluation, was.splits, was.base_model)


@settings(max_examples=30, deadline=None)
@given(
    table=st.lists(st.tuples(codes, st.integers(-1, 2), st.integers(-1, 2)), min_size=5, max_size=60),
    metric=metrics,
    better=st.sampled_from(["ours", "theirs", "neither"]),
    floor=st.sampled_from([None, 0.3]),
)
def test_of_two_releases_at_most_one_is_promoted_over_the_other(table, metric, better, floor):
    """With a share of one side's answers put right, so that promotions occur."""
    target, *said = (list(column) for column in zip(*table, strict=True))
    if better != "neither":
        place = 0 if better == "ours" else 1
        said[place] = [right if row % 4 else answer for row, (right, answer) in enumerate(zip(target, said[place], strict=True))]
    one, other = side(target, said[0]), side(target, said[1], release="c" * 64)
    policy = Policy(metric=metric, **ONE_LOOK, floors={} if floor is None else {"accuracy": floor})
    verdicts = [judge(one, other, policy).verdict, judge(other, one, policy).verdict]
    assert verdicts.count("PROMOTE") < 2
    event(f"{better} put right: {' and '.join(sorted(verdicts))}")


def test_a_look_is_paid_for_once_and_on_its_own_split(candidate, champion):
    def entry(n, look):
        return Entry(n, "", None, "", "hold", "", "", {"look": look})

    def look(release="a" * 64, champion="c" * 64, splits=Splits(), **policy):  # noqa: B008  frozen
        side = replace(candidate, splits=splits, evaluation=replace(candidate.evaluation, release=release))
        return look_of(side, champion, PROMPT.model_copy(update={"promote": Policy(metric="accuracy", **policy)}))

    first, again, dearer, second = look(), look(), look(looks_per_test_split=5), look(release="d" * 64)
    assert first == again
    assert first["takes"] == pytest.approx(0.05 / 52)
    assert (dearer["comparison"], dearer["takes"]) == (first["comparison"], pytest.approx(0.01))
    entries = [Entry(0, "", None, "", "found", "", "", {}), *(entry(n, each) for n, each in enumerate([None, first, dearer, again], 1))]
    assert spent_before(entries, first) == 0
    assert spent_before(entries, second) == pytest.approx(0.01)
    assert spent_before(entries, look(champion="e" * 64)) == pytest.approx(0.01)
    assert spent_before(entries, look(splits=Splits(salt="2027"), release="d" * 64)) == 0
    same_test_rows = look(splits=Splits(train=0.5, validation=0.25, test=0.25), release="d" * 64)
    assert spent_before(entries, same_test_rows) == pytest.approx(0.01)
    nothing_tuned = look(splits=None, release="d" * 64)
    assert nothing_tuned["split"] == second["split"]
