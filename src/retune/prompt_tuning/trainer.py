"""The optimizer loop: gradients reach the soft prompt alone, the best prompt on validation is kept."""

import logging
from collections.abc import Callable, Sequence

import torch

from retune.inference.base_model import BaseModel
from retune.inference.inputs import EncodedRow, Packed, pack, sorted_batches
from retune.inference.scoring import answer_losses, row_losses, run_prefix
from retune.prompt_tuning.result import CurveRow, DivergedError, TuneResult
from retune.prompt_tuning.schedule import epoch_batches, learning_rate_at, total_steps

__all__ = ["LEAST_LEARNING_RATE", "VALIDATION_TOKENS", "OnStep", "optimise", "validation_batches", "validation_loss"]

LEAST_LEARNING_RATE = 1e-3
"""Below it a soft prompt learns little or nothing (PERFORMANCE.md: 94 % at .01, 37 % at 5e-5): a run warns."""
VALIDATION_TOKENS = 4096
"""Tokens of a forward pass over the validation split."""

OnStep = Callable[[CurveRow], None]
"""Called after each optimizer step with its row of the curve."""

logger = logging.getLogger(__name__)


def optimise(
    base: BaseModel,
    start: torch.Tensor,
    train: Sequence[EncodedRow],
    validation: Sequence[EncodedRow],
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    warmup_steps: int,
    weight_decay: float,
    max_grad_norm: float,
    validate_every: int,
    seed: int,
    on_step: OnStep,
) -> TuneResult:
    """Tunes a soft prompt with AdamW on the cross entropy of the answers, and returns the one with the least validation loss.

    start: [P, H], left as it is. validate_every: optimizer steps; the last step is validated in any case.

    The same arguments on the same machine with the same number of threads give the same bytes.

    Raises DivergedError if a loss or the gradient is not finite.
    """
    if learning_rate < LEAST_LEARNING_RATE:
        logger.warning("tune.learning_rate %g is below %g: soft prompts hardly move at such rates", learning_rate, LEAST_LEARNING_RATE)
    soft_prompt = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([soft_prompt], lr=learning_rate, weight_decay=weight_decay)
    total = total_steps(len(train), batch_size, epochs)
    held_out = validation_batches(base, validation, len(start))
    initial = validation_loss(base, start, held_out)
    best, best_loss, best_step = start.detach().clone(), initial, 0
    curve: list[CurveRow] = []

    def result() -> TuneResult:
        return TuneResult(best.cpu(), curve, len(curve), best_step, best_loss, initial)

    for step, (epoch, numbers) in enumerate(epoch_batches(len(train), batch_size, epochs, seed), 1):
        rate = learning_rate_at(step, learning_rate, warmup_steps, total)
        optimizer.param_groups[0]["lr"] = rate
        loss = _loss(base, soft_prompt, [train[i] for i in numbers])
        if not bool(torch.isfinite(loss)):
            raise DivergedError("training loss", loss.item(), step, rate, result())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        norm = torch.nn.utils.clip_grad_norm_([soft_prompt], max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise DivergedError("gradient norm", norm.item(), step, rate, result())
        optimizer.step()
        held_out_loss = None
        if step % validate_every == 0 or step == total:
            held_out_loss = validation_loss(base, soft_prompt, held_out)
            if not held_out_loss < float("inf"):
                raise DivergedError("validation loss", held_out_loss, step, rate, result())
            if held_out_loss < best_loss:
                best, best_loss, best_step = soft_prompt.detach().clone(), held_out_loss, step
        row = CurveRow(step=step, epoch=epoch, train_loss=loss.item(), validation_loss=held_out_loss, learning_rate=rate)
        curve.append(row)
        on_step(row)
    return result()


def validation_batches(base: BaseModel, rows: Sequence[EncodedRow], size: int) -> list[Packed]:
    """The validation split laid out after P = `size` virtual tokens, once for all passes."""
    return [pack([rows[i] for i in numbers], size, base.device) for numbers in sorted_batches(rows, VALIDATION_TOKENS)]


@torch.no_grad()
def validation_loss(base: BaseModel, soft_prompt: torch.Tensor | None, batches: Sequence[Packed]) -> float:
    """Mean over all answer tokens of the batches, nats."""
    prefix = run_prefix(base, soft_prompt)
    total = sum(row_losses(base, prefix, batch).sum() for batch in batches)
    return float(total / sum(len(batch.targets) for batch in batches))


def _loss(base: BaseModel, soft_prompt: torch.Tensor, rows: Sequence[EncodedRow]) -> torch.Tensor:
    """Mean over the rows' answer tokens, nats: a scalar with a gradient."""
    return answer_losses(base, run_prefix(base, soft_prompt), pack(rows, len(soft_prompt), base.device)).mean()
