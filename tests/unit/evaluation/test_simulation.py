"""The gate on releases whose true difference is known. `retune simulate-gate` runs the same at full size."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from retune.cli import app
from retune.evaluation import simulation
from retune.evaluation.simulation import SCENARIOS, mcnemar_power, power, simulate
from retune.policy import Policy


def test_equal_releases_are_promoted_no_more_often_than_the_policy_allows():
    policy = Policy(metric="accuracy", looks_per_test_split=6)
    found = list(simulate(300, policy, seed=4))
    assert [each.scenario for each in found] == [*SCENARIOS, "year of 6 looks at one test split, accuracy, 250 rows"]
    for each in found:
        assert each.comparisons == 300
        assert each.kept, each
        assert each.false_promotion_rate == each.false_promotions / 300
        assert each.lower_bound <= each.false_promotion_rate <= each.upper_bound
    assert sum(each.false_promotions for each in found) > 0  # a gate that never promotes would pass too


def test_a_gate_that_promotes_too_often_is_found(monkeypatch):
    monkeypatch.setattr(simulation, "promoted", lambda *_: True)
    assert not any(each.kept for each in simulate(100, Policy(metric="accuracy", looks_per_test_split=2), seed=4))


def test_equal_releases_are_as_good_and_as_different_as_is_said():
    rng = np.random.default_rng(2)
    right, differ = [], []
    for _ in range(100):
        draw, _ = SCENARIOS["accuracy, 250 rows"](rng)
        one, other = draw(rng)[:, 0], draw(rng)[:, 0]
        right.append(one.mean())
        differ.append((one != other).mean())
    assert np.mean(right) == pytest.approx(simulation.RIGHT, abs=0.01)
    assert np.mean(differ) == pytest.approx(simulation.DISAGREE, abs=0.01)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_draws_of_a_scenario_differ(name):
    rng = np.random.default_rng(2)
    draw, total = SCENARIOS[name](rng)
    values = {total(draw(rng).sum(0, keepdims=True)).item() for _ in range(20)}
    assert len(values) > 5


def test_gains_are_found_as_often_as_mcnemars_test_finds_them(monkeypatch):
    monkeypatch.setattr(simulation, "POWER_ROWS", (400,))
    monkeypatch.setattr(simulation, "POWER_GAINS", (0.0, 0.05, 0.15))
    none, some, all_of_them = power(200, Policy(metric="accuracy", looks_per_test_split=1), seed=1)
    assert none.power < 0.12
    assert some.power == pytest.approx(some.closed_form, abs=0.12)  # 200 draws: 3.5 standard errors
    assert 0.3 < some.closed_form < 0.9
    assert (all_of_them.power, all_of_them.closed_form) == pytest.approx((1, 1), abs=0.02)


def test_mcnemars_power_by_hand():
    """n = 100, gain 0.1 of 0.2 that differ, alpha 0.05: (1 - 1.645 * sqrt(0.2)) / sqrt(0.19) = 0.607 deviations, 0.728."""
    assert mcnemar_power(100, 0.1, 0.2, 0.05) == pytest.approx(0.728, abs=1e-3)


def test_the_command_prints_rates_with_their_intervals_and_power(monkeypatch):
    monkeypatch.setattr(simulation, "POWER_ROWS", (173,))
    monkeypatch.setattr(simulation, "POWER_GAINS", (0.15,))
    arguments = ["simulate-gate", "--comparisons", "100", "--looks", "2"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    fields = {"scenario", "confidence", "comparisons", "false_promotions", "false_promotion_rate", "lower_bound", "upper_bound"}
    assert [set(row) for row in found["false_promotions"]] == [fields] * 5
    assert [set(row) for row in found["power"]] == [{"rows", "gain", "power", "closed_form"}]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "99 % interval" in shown
    assert "gain 0.15" in shown


def test_the_command_fails_where_the_gate_does(monkeypatch):
    monkeypatch.setattr(simulation, "promoted", lambda *_: True)
    result = CliRunner().invoke(app, ["simulate-gate", "--comparisons", "100", "--looks", "1"])
    assert result.exit_code == 1
    assert "more false promotions than 1 - confidence allows" in result.stderr
