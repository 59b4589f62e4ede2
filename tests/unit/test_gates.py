"""Gates beside the gain, from predictions to verdict: rows of known answers, so that every figure can be counted by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from retune.config import Prompt, Splits
from retune.evaluation.flips import mcnemar, share_bounds
from retune.evaluation.metrics import evaluate
from retune.policy import Policy
from retune.promotion import Side, decide
from retune.records import Decision

LABELS = ["no", "yes"]
PROMPT = Prompt.model_validate(
    {
        "name": "told",
        "task": "classification",
        "base_model": {"path": "examples/base_model", "sha256": "0" * 64},
        "source": "landing",
        "template": "{text} Answer:",
        "target": "label",
        "labels": {label: f" {label}" for label in LABELS},
        "slices": ["channel"],
    }
)
ROWS = 200


def frame(right: "np.ndarray[Any, Any]", confidence: float, start: str = "row") -> pd.DataFrame:
    """All references are `no`; the prediction is `yes` where not right, at this confidence."""
    said = np.where(right, "no", "yes")
    chance = np.where(right, confidence, 1 - confidence)
    rows = len(right)
    return pd.DataFrame(
        {
            "id": [f"{start}-{row}" for row in range(rows)],
            "group": [f"{start}-{row}" for row in range(rows)],
            "channel": ["web" if row % 2 else "mail" for row in range(rows)],
            "target": "no",
            "prediction": said,
            "p_no": chance,
            "p_yes": 1 - chance,
        }
    )


def side(right: "np.ndarray[Any, Any]", confidence: float = 0.9, sets: dict[str, Any] | None = None, **changes: Any) -> Side:
    """A release from which rows it has right. sets: name -> right rows of a labelled set, or (right rows, unchanged ids) of a probe."""
    predictions = frame(right, confidence)
    parts = []
    for name, told in (sets or {}).items():
        of, answers = (None, told) if isinstance(told, np.ndarray) else (predictions["id"][: len(told[0])], told[0])
        parts.append(frame(answers, confidence, name).assign(set=name, of=of))
    probes = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"set": []})
    evaluation = evaluate(predictions, PROMPT, changes.pop("release", "a" * 64), "e" * 64, probes)
    return replace(Side(evaluation, predictions, Splits(), "b" * 64, probes), **changes)


def first(count: int, rows: int = ROWS) -> "np.ndarray[Any, Any]":
    return np.arange(rows) < count


def judge(candidate: Side, champion: Side, **policy: Any) -> Decision:
    asked = Policy(metric="accuracy", resamples=200, looks_per_test_split=1, **policy)
    return decide(candidate, champion, asked, LABELS, barred=False, same_release=False)


def gate(decision: Decision, name: str) -> dict[str, Any]:
    (found,) = [each for each in decision.gates if each["name"] == name]
    return found


GOOD, POOR = first(180), first(120)


def test_the_comparison_counts_who_has_which_rows_right() -> None:
    lost = first(200) & ~first(5)  # all but 5 rows, which the champion has
    decision = judge(side(lost), side(POOR))
    compared = decision.comparison
    assert compared is not None
    assert (compared["won"], compared["lost"]) == (80, 5)
    assert compared["mcnemar"] == pytest.approx(mcnemar(80, 5))
    assert compared["won_low"] < 80 / 85 < compared["won_high"]


def test_mcnemars_test_by_hand() -> None:
    assert mcnemar(3, 0) == pytest.approx(2 * 0.5**3)
    assert mcnemar(2, 1) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_bounds_of_a_share_by_hand() -> None:
    """None of n rows: the upper end is where (1 - p)^n is 1 - confidence."""
    assert share_bounds(0, 10, 0.95) == (0.0, pytest.approx(1 - 0.05 ** (1 / 10)))
    assert share_bounds(10, 10, 0.95) == (pytest.approx(0.05 ** (1 / 10)), 1.0)


@pytest.mark.parametrize(
    ("confidence", "verdict", "words"),
    [(0.9, "PROMOTE", "is shown to lose less than"), (0.9999999, "REJECT", "loses more than")],
)
def test_a_secondary_metric_must_not_lose_more_than_its_margin(confidence: float, verdict: str, words: str) -> None:
    """A candidate that is right more often and far too sure of what it has wrong: log loss falls apart."""
    decision = judge(side(GOOD, confidence), side(POOR, 0.7), margins={"log_loss": 0.05})
    assert decision.verdict == verdict
    assert f"log_loss {words} the margin of 0.0500" in gate(decision, "margins.log_loss")["reason"]


def test_a_loss_within_the_margin_that_few_rows_cannot_show_is_held() -> None:
    decision = judge(side(first(9, 10)), side(first(9, 10)[::-1]), margins={"macro_f1": 0.01})
    assert gate(decision, "margins.macro_f1")["passed"] is False
    assert "cannot be shown to lose less than" in gate(decision, "margins.macro_f1")["reason"]
    assert decision.verdict == "HOLD"


def test_a_broken_slice_rejects_a_better_candidate_with_the_falls_interval() -> None:
    """Better by 60 rows in all, and by none of them in `mail`: there it falls from 60 to 45 %."""
    web = np.arange(ROWS) % 2 == 1
    mail = ~web & (np.cumsum(~web) <= 45)
    decision = judge(side(web | mail), side(web & first(ROWS // 2) | ~web & (np.cumsum(~web) <= 60)), max_slice_gap=0.1)
    assert gate(decision, "gain")["passed"]
    assert decision.verdict == "REJECT"
    found = gate(decision, "slices")
    assert found["value"] == pytest.approx(0.15)
    assert 0 < found["low"] < 0.15 < found["high"]
    assert decision.reasons[0] == "accuracy gets worse by more than 0.1000 in channel=mail (0.6000 to 0.4500, 100 rows)."


def test_a_labelled_set_and_a_probe_are_guarded_like_slices() -> None:
    ours = {"old_failures": first(40, 50), "typos": (first(30, 50),)}
    theirs = {"old_failures": first(40, 50), "typos": (first(45, 50),)}
    decision = judge(side(GOOD, sets=ours), side(POOR, sets=theirs), max_slice_gap=0.1)
    assert decision.reasons[0] == "accuracy gets worse by more than 0.1000 in set=typos (0.9000 to 0.6000, 50 rows)."
    assert judge(side(GOOD, sets=theirs), side(POOR, sets=theirs), max_slice_gap=0.1).verdict == "PROMOTE"


def test_a_set_that_one_side_lacks_is_no_promotion() -> None:
    with_set, without = side(GOOD, sets={"old_failures": first(40, 50)}), side(GOOD)
    assert judge(without, with_set, max_slice_gap=0.1).verdict == "REJECT"
    assert gate(judge(with_set, side(POOR)), "slices")["passed"] is False


@pytest.mark.parametrize(("right", "verdict"), [(3, "REJECT"), (4, "PROMOTE")])
def test_a_floor_of_a_named_set_counts_however_small_it_is(right: int, verdict: str) -> None:
    candidate = side(GOOD, sets={"regression": first(right, 4)})
    asked = Policy(metric="accuracy", resamples=200, looks_per_test_split=1, slice_floors={"set=regression": 1.0})
    decision = decide(candidate, side(POOR, sets={"regression": first(0, 4)}), asked, LABELS, barred=False, same_release=False)
    assert decision.verdict == verdict
    found = gate(decision, "slice_floors.set=regression")
    assert "in set=regression (4 rows)" in found["reason"]
    assert found["low"] <= found["value"] <= found["high"]
    assert (found["low"] < 1) == (right < 4), "all rows right in every resample"


def test_a_floor_of_a_slice_that_is_not_there_rejects() -> None:
    decision = judge(side(GOOD), side(POOR), slice_floors={"channel=fax": 0.1})
    assert decision.verdict == "REJECT"
    assert decision.reasons[0] == "The candidate has no accuracy for channel=fax, whose floor is 0.1000."


@pytest.mark.parametrize(("largest", "verdict"), [(0.05, "PROMOTE"), (0.04, "REJECT"), (None, "PROMOTE")])
def test_negative_flips_are_counted_and_limited(largest: float | None, verdict: str) -> None:
    ours = ~first(10)  # 10 rows of 200 that the champion has right are lost
    decision = judge(side(ours), side(POOR), max_negative_flips=largest)
    assert decision.verdict == verdict
    found = gate(decision, "negative_flips")
    assert found["value"] == 0.05
    assert found["reason"].startswith("10 of 200 rows that the champion has right are wrong now, 5 % (from 2.")
    assert "80 the other way round" in found["reason"]


@pytest.mark.parametrize(("largest", "verdict"), [(0.2, "PROMOTE"), (0.19, "REJECT")])
def test_answers_that_a_probe_changes_are_limited(largest: float, verdict: str) -> None:
    candidate = side(GOOD, sets={"swaps": (first(40, 50),)})  # 10 of 50 answers change: the first 180 rows are right as they were
    decision = judge(candidate, side(POOR, sets={"swaps": (first(50, 50),)}), max_changed={"swaps": largest})
    assert candidate.evaluation.sets["swaps"]["changed"] == pytest.approx(0.2)
    assert decision.verdict == verdict


def test_a_probe_that_changed_no_row_cannot_pass() -> None:
    decision = judge(side(GOOD), side(POOR), max_changed={"injections": 1.0})
    assert decision.verdict == "HOLD"
    assert "No test row was changed by the probe injections" in decision.reasons[0]


def test_another_base_model_must_be_approved() -> None:
    decision = judge(side(GOOD, base_model="d" * 64), side(POOR))
    assert (decision.verdict, decision.ask) == ("PROMOTE", True)
    assert judge(side(GOOD), side(POOR)).ask is False


def test_perplexity_under_another_tokenizer_is_compared_per_byte() -> None:
    """Twice the tokens for the same text: fewer nats per token, no less per byte."""
    prompt = PROMPT.model_copy(update={"task": "generation", "labels": {}, "slices": {}})

    def texts(nats: float, tokens: int, base_model: str) -> Side:
        rows = [f"row-{row}" for row in range(60)]
        told = {"prediction": "a b", "target": "a c", "reference_nats": nats, "reference_tokens": tokens, "truncated": False}
        predictions = pd.DataFrame({"id": rows, "group": rows, **{name: [value] * 60 for name, value in told.items()}})
        evaluation = evaluate(predictions, prompt, base_model, "e" * 64)
        return Side(evaluation, predictions, Splits(), base_model, pd.DataFrame({"set": []}))

    asked = Policy(metric="perplexity", resamples=200, looks_per_test_split=1)
    champion = texts(6.0, 3, "b" * 64)
    found = decide(texts(6.0, 6, "d" * 64), champion, asked, [], barred=False, same_release=False)
    assert found.comparison is not None
    assert found.comparison["metric"] == "perplexity_per_byte"
    assert found.comparison["candidate"] == pytest.approx(np.exp(6 / 3))
    assert found.verdict == "HOLD"
    same = decide(texts(6.0, 6, "b" * 64), champion, asked, [], barred=False, same_release=False)
    assert same.comparison is not None
    assert (same.comparison["metric"], same.verdict) == ("perplexity", "PROMOTE")


@pytest.mark.parametrize(
    ("promote", "evaluate_", "message"),
    [
        ({"slice_floors": {"fax": 0.5}}, {}, "slice_floors"),
        ({"slice_floors": {"region=emea": 0.5}}, {}, "must name a slice as COLUMN=VALUE or a set as set=NAME, got 'region=emea'"),
        ({"max_changed": {"spelling": 0.5}}, {}, "max_changed"),
        ({"margins": {"bleu": 0.5}}, {}, "promote.margins must name one of"),
        ({}, {"test_sets": {"typos": {"path": "x.csv", "sha256": "0" * 64}}}, "must not be named typos"),
        ({}, {"probes": {"templates": ["no field"]}}, "must hold the template's fields text"),
    ],
)
def test_a_prompt_file_that_asks_for_what_is_not_there_is_refused(promote: Any, evaluate_: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Prompt.model_validate({**PROMPT.model_dump(mode="json"), "promote": {"metric": "accuracy", **promote}, "evaluate": evaluate_})
