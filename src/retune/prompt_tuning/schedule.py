"""When the learning rate is what, and which rows make a step."""

import random
from collections.abc import Iterator

__all__ = ["epoch_batches", "learning_rate_at", "total_steps"]


def total_steps(rows: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps; an epoch's last batch may be smaller."""
    return epochs * -(-rows // batch_size)


def learning_rate_at(step: int, peak: float, warmup_steps: int, total: int) -> float:
    """Rate of `step` (1 to `total`): linear up to `peak` at step `warmup_steps`, then linear, to reach 0 one step after the last.

    A warm-up longer than the run is cut to it; none at all is one step at the peak.
    """
    warmup = max(1, min(warmup_steps, total))
    if step <= warmup:
        return peak * step / warmup
    return peak * (total - step + 1) / (total - warmup + 1)


def epoch_batches(rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch from 1, row numbers), every row once per epoch in an order drawn from the seed."""
    order = random.Random(seed)
    for epoch in range(1, epochs + 1):
        numbers = order.sample(range(rows), rows)
        for start in range(0, rows, batch_size):
            yield epoch, numbers[start : start + batch_size]
