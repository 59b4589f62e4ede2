"""What a tuning run hands back, and the error that ends one early."""

from dataclasses import dataclass, field
from typing import TypedDict

import torch

from retune.errors import StageError

__all__ = ["CurveRow", "DivergedError", "TuneResult"]


class CurveRow(TypedDict):
    """One optimizer step."""

    step: int
    """From 1."""
    epoch: int
    """From 1."""
    train_loss: float
    """Mean over the batch's answer tokens before the step, nats."""
    validation_loss: float | None
    """Mean over the validation split's answer tokens after the step, nats; None where no validation took place."""
    learning_rate: float
    """Of this step."""


@dataclass(frozen=True)
class TuneResult:
    best: dict[str, torch.Tensor]
    """What is released, by name, on the CPU: the best on validation. A soft prompt is `prompt_embeddings`, [P, H]; none: nothing."""
    curve: list[CurveRow]
    steps: int
    """Optimizer steps taken."""
    best_step: int
    """Step of `best`; 0: no step was better than the start."""
    best_validation_loss: float
    """Nats per answer token."""
    initial_validation_loss: float
    """The same before the first step (for method none: of the template alone)."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """Method few_shot: what is released in place of tensors (see `retune.inference.examples`)."""


class DivergedError(StageError):
    """Loss or gradient is no longer a finite number. The same inputs would diverge again: lower the learning rate."""

    def __init__(self, what: str, value: float, step: int, learning_rate: float, best: TuneResult) -> None:
        """best: the run up to here, with the last good tensors."""
        super().__init__(
            f"{what} must be finite, got {value} at step {step} (learning rate {learning_rate:g}); lower tune.learning_rate. "
            f"Best prompt so far: step {best.best_step}, validation loss {best.best_validation_loss:.4f}"
        )
        self.step = step
        self.best = best
