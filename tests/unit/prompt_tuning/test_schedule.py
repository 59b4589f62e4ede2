import pytest

from retune.prompt_tuning.schedule import epoch_batches, learning_rate_at, total_steps


def test_rate_rises_to_its_peak_and_falls_to_zero_one_step_after_the_last():
    rates = [learning_rate_at(step, 1.0, 4, 9) for step in range(1, 10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_without_warm_up_the_rate_starts_at_its_peak():
    assert [learning_rate_at(step, 0.1, 0, 2) for step in (1, 2)] == pytest.approx([0.1, 0.05])


def test_a_warm_up_longer_than_the_run_is_cut():
    assert [learning_rate_at(step, 1.0, 10, 2) for step in (1, 2)] == [0.5, 1.0]


def test_every_row_comes_once_per_epoch_in_a_seeded_order():
    batches = list(epoch_batches(5, 2, 3, seed=7))
    assert [epoch for epoch, _ in batches] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(batches) == total_steps(5, 2, 3)
    orders = [[i for e, batch in batches if e == epoch for i in batch] for epoch in (1, 2, 3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert batches == list(epoch_batches(5, 2, 3, seed=7))
    assert batches != list(epoch_batches(5, 2, 3, seed=8))
