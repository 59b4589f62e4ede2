"""When the learning rate is what, and which rows make a step."""

import random
from collections.abc import Iterator, Sequence

from retune.config import Tune
from retune.inference.inputs import by_tokens

__all__ = ["epoch_batches", "learning_rate_at", "total_steps"]


def total_steps(lengths: Sequence[int], settings: Tune) -> int:
    """Optimizer steps of `epoch_batches`."""
    return sum(1 for _ in epoch_batches(lengths, settings))


def learning_rate_at(step: int, peak: float, warmup_steps: int, total: int) -> float:
    """Rate of `step` (1 to `total`): linear up to `peak` at step `warmup_steps`, then linear, to reach 0 one step after the last.

    A warm-up longer than the run is cut to it; none at all is one step at the peak.
    """
    warmup = max(1, min(warmup_steps, total))
    if step <= warmup:
        return peak * step / warmup
    return peak * (total - step + 1) / (total - warmup + 1)


def epoch_batches(lengths: Sequence[int], settings: Tune) -> Iterator[tuple[int, list[int]]]:
    """(epoch from 1, row numbers), every row once per epoch in an order drawn from the seed; an epoch's last batch may be smaller.

    lengths: tokens of each row; one that is longer than `batch_tokens` is a batch of its own.
    """
    order = random.Random(settings.seed)
    for epoch in range(1, settings.epochs + 1):
        numbers = order.sample(range(len(lengths)), len(lengths))
        if settings.batch_tokens is None:
            batches = [numbers[start : start + settings.batch_size] for start in range(0, len(numbers), settings.batch_size)]
        else:
            batches = by_tokens(numbers, [lengths[i] for i in numbers], settings.batch_tokens)
        yield from ((epoch, batch) for batch in batches)
