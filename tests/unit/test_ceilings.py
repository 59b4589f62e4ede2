"""The gates on checks, time and cost, one by one."""

import math
from dataclasses import replace
from typing import Any

import pytest

from retune.ceilings import checks_gate, cost_gate, latency_gate
from retune.errors import BadInputError
from retune.policy import Policy
from retune.records import CheckResult, Measured

CANDIDATE = Measured(8.0, 12.5, 3000.0, 2560, 1800.0, 2.0)
CHAMPION = replace(CANDIDATE, latency_p95_ms=10.0)
MEASURED = {"candidate": CANDIDATE, "champion": CHAMPION}


def check(name: str, passed: bool, required: bool = True) -> CheckResult:
    return CheckResult(name, required, passed, f"Expected 'high'; got {'high' if passed else 'low'!r}.")


def test_a_failed_required_check_rejects_and_is_named() -> None:
    gate = checks_gate([check("outage", False), check("calm", True), check("capitals", False, required=False)])
    assert (gate.passed, gate.on_fail, gate.value, gate.threshold) == (False, "REJECT", 1.0, 0.0)
    assert gate.reason == (
        "1 of 2 required checks failed. outage: Expected 'high'; got 'low'. 1 of 1 that are only reported failed."
    )  # fmt: skip


def test_checks_that_are_only_reported_reject_nothing_but_are_told() -> None:
    gate = checks_gate([check("calm", True), check("capitals", False, required=False), check("names", True, required=False)])
    assert (gate.passed, gate.reason) == (True, "All 1 required checks passed. 1 of 2 that are only reported failed.")


def test_many_failed_checks_are_counted() -> None:
    assert checks_gate([check(f"check {n}", False) for n in range(7)]).reason.endswith(" And 2 more.")


def test_no_file_of_checks_passes_and_one_that_was_not_run_holds() -> None:
    assert checks_gate(None).passed
    gate = checks_gate([])
    assert (gate.passed, gate.on_fail) == (False, "HOLD")
    assert "not all of them were run" in gate.reason


@pytest.mark.parametrize(
    ("limits", "passed", "threshold", "told"),
    [
        ({"max_latency_ms": 12.5}, True, 12.5, "takes 12.5 ms at the 95th percentile, within 12.5 ms."),
        ({"max_latency_ms": 12.4}, False, 12.4, "takes 12.5 ms at the 95th percentile, more than allowed: 12.4 ms."),
        ({"max_latency_ratio": 1.25}, True, 12.5, "within 1.25 times the champion's 10.0 ms."),
        ({"max_latency_ratio": 1.2}, False, 12.0, "more than allowed: 1.2 times the champion's 10.0 ms."),
        ({"max_latency_ms": 100, "max_latency_ratio": 1.2}, False, 12.0, "more than allowed: 100 ms and 1.2 times the champion's 10.0 ms."),
    ],
)
def test_the_candidates_time_is_held_against_each_limit(limits: dict[str, Any], passed: bool, threshold: float, told: str) -> None:
    gate = latency_gate(MEASURED, Policy(**limits))
    assert (gate.passed, gate.value, gate.threshold, gate.on_fail) == (passed, 12.5, pytest.approx(threshold), "REJECT")
    assert gate.reason.endswith(told)


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        (None, "nothing was measured of the candidate"),
        ({"candidate": CANDIDATE}, "nothing was measured of the champion"),
        ({**MEASURED, "champion": replace(CHAMPION, latency_p95_ms=math.nan)}, "must be above 0, got nan for the champion"),
        ({**MEASURED, "candidate": replace(CANDIDATE, latency_p95_ms=0.0)}, "must be above 0, got 0.0 for the candidate"),
    ],
)
def test_a_time_that_is_not_known_is_no_time_within_a_limit(measured: dict[str, Measured] | None, told: str) -> None:
    with pytest.raises(BadInputError, match=told):
        latency_gate(measured, Policy(max_latency_ratio=2))


def test_a_cost_is_held_against_its_limit() -> None:
    gate = cost_gate(MEASURED, Policy(max_cost=2.0))
    assert (gate.passed, gate.value, gate.threshold) == (True, 2.0, 2.0)
    gate = cost_gate(MEASURED, Policy(max_cost=1.5))
    assert (gate.passed, gate.on_fail) == (False, "REJECT")
    assert gate.reason == "Tuning the candidate took 1,800 s at a cost of 2, more than max_cost 1.5."


def test_a_cost_that_is_not_known_names_what_is_missing() -> None:
    for figures, told in (
        (replace(CANDIDATE, cost=None), "set RETUNE_DEVICE_HOUR_PRICE"),
        (replace(CANDIDATE, cost=math.nan), "set RETUNE_DEVICE_HOUR_PRICE"),
        (replace(CANDIDATE, cost=None, tune_seconds=math.nan), "tuning seconds are not known"),
    ):
        with pytest.raises(BadInputError, match=told):
            cost_gate({"candidate": figures}, Policy(max_cost=1))


def test_without_a_limit_nothing_has_to_be_known() -> None:
    for gate in (latency_gate(None, Policy()), cost_gate(None, Policy())):
        assert gate.passed
        assert "reported only" in gate.reason
