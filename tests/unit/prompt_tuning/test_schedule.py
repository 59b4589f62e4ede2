from itertools import pairwise

import pytest

from retune.config import Tune
from retune.prompt_tuning.schedule import epoch_batches, learning_rate_at, total_steps


def test_rate_rises_to_its_peak_and_falls_to_zero_one_step_after_the_last():
    rates = [learning_rate_at(step, 1.0, 4, 9) for step in range(1, 10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_without_warm_up_the_rate_starts_at_its_peak():
    assert [learning_rate_at(step, 0.1, 0, 2) for step in (1, 2)] == pytest.approx([0.1, 0.05])


def test_a_warm_up_longer_than_the_run_is_cut():
    assert [learning_rate_at(step, 1.0, 10, 2) for step in (1, 2)] == [0.5, 1.0]


@pytest.mark.parametrize("rule", [{"batch_size": 2}, {"batch_tokens": 7}])
def test_every_row_comes_once_per_epoch_in_a_seeded_order(rule):
    lengths = [3, 4, 5, 9, 2]
    settings = Tune(epochs=3, seed=7, **rule)
    batches = list(epoch_batches(lengths, settings))
    assert sorted({epoch for epoch, _ in batches}) == [1, 2, 3]
    assert len(batches) == total_steps(lengths, settings)
    orders = [[i for e, batch in batches if e == epoch for i in batch] for epoch in (1, 2, 3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert batches == list(epoch_batches(lengths, settings))
    assert batches != list(epoch_batches(lengths, settings.model_copy(update={"seed": 8})))


def test_a_batch_has_so_many_rows_whatever_their_length():
    batches = [batch for _, batch in epoch_batches([3, 4, 5, 9, 2], Tune(epochs=1, batch_size=2))]
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_a_batch_has_the_rows_that_its_tokens_hold_and_a_longer_row_one_of_its_own():
    lengths, settings = [3, 4, 5, 9, 2], Tune(epochs=20, batch_tokens=7)
    seen = set()
    for epoch in range(1, 21):
        batches = [[lengths[i] for i in batch] for of, batch in epoch_batches(lengths, settings) if of == epoch]
        assert all(sum(batch) <= 7 or batch == [9] for batch in batches)
        assert all(sum(batch) + after[0] > 7 for batch, after in pairwise(batches)), "another row had room"
        seen |= {len(batch) for batch in batches}
    assert seen == {1, 2}
