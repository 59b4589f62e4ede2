"""The optimizer loop: gradients reach what is tuned alone, the best on validation is kept."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from retune.config import Tune
from retune.errors import StageError
from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel
from retune.inference.families import Laid, carried, family_of, row_losses
from retune.inference.inputs import EncodedRow, by_tokens, sorted_batches
from retune.prompt_tuning.checkpoints import Checkpoint, State, Stop, StoppedError
from retune.prompt_tuning.processes import add_up, is_first, share
from retune.prompt_tuning.result import CurveRow, DivergedError, TuneResult
from retune.prompt_tuning.schedule import epoch_batches, learning_rate_at, total_steps

__all__ = ["BETAS", "LEAST_LEARNING_RATE", "VALIDATION_TOKENS", "OnStep", "Tuned", "optimise", "validation_batches", "validation_loss"]

LEAST_LEARNING_RATE = 1e-3
"""Below it a soft prompt learns little or nothing (PERFORMANCE.md: 94 % at .01, 37 % at 5e-5): a run warns."""
BETAS = (0.8, 0.95)
"""Of AdamW. A tuning run has hundreds of steps; torch's (.9, .999) remember longer than that. On the example prompts, at the same
rates over 3 epochs and means over seeds, these gave a validation loss of .119 and .69 where those gave .154 and .77."""
VALIDATION_TOKENS = 1024
"""Tokens of a forward pass over the validation split: of 4096, one took 1.4 times as long on a CPU."""

OnStep = Callable[[CurveRow], None]
"""Called after each optimizer step with its row of the curve."""

logger = logging.getLogger(__name__)


class Tuned(Protocol):
    """What a method tunes."""

    base: BaseModel
    """What rows run through: the base model, or a copy that holds what is tuned."""
    parameters: dict[str, torch.Tensor]
    """By name: leaves that require a gradient."""
    size: int
    """P: virtual tokens before each row."""

    def prefix(self) -> Prefix | None:
        """What every row follows, computed from the parameters; gradients flow into them."""
        ...

    def released(self, best: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a release keeps, by its name there, given values of the parameters by name."""
        ...


def optimise(
    base: BaseModel,
    tuned: Tuned,
    train: Sequence[EncodedRow],
    validation: Sequence[EncodedRow],
    settings: Tune,
    on_step: OnStep = lambda _: None,
    checkpoint: Checkpoint | None = None,
    stop: Stop | None = None,
) -> TuneResult:
    """Tunes with AdamW (arXiv:1711.05101) on the cross entropy of the answers; returns the parameters with the least validation loss.

    tuned: its parameters are changed in place. checkpoint: read first and written as the run goes; a run that goes on from one ends with
    the bytes of an undisturbed run. stop: its StoppedError is passed on once the state is saved.

    On a CPU, the same arguments on the same machine with the same number of threads give the same bytes. In a process group (see
    `processes`) every process returns the same.

    Raises DivergedError if a loss or the gradient is not finite, StageError if memory does not suffice for a single row.
    """
    run = _Run(base, tuned, train, validation, settings, stop or Stop())
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        run.restore(state)
        logger.warning("going on from the checkpoint of step %d of %d", run.step, run.total)
    else:
        run.begin()
    try:
        run.go(on_step, checkpoint)
    except StoppedError as error:
        if checkpoint is None or not run.began or not is_first():
            raise
        checkpoint.save(run.state())
        raise StoppedError(f"{error} at step {run.step} of {run.total}; the checkpoint is saved, a retry goes on from it") from None
    return run.result()


class _Run:
    """One run's state: whole between two steps, so that it can be saved there."""

    def __init__(
        self, base: BaseModel, tuned: Tuned, train: Sequence[EncodedRow], validation: Sequence[EncodedRow], settings: Tune, stop: Stop
    ) -> None:
        if settings.learning_rate < LEAST_LEARNING_RATE and tuned.size:
            logger.warning(
                "tune.learning_rate %g is below %g: soft prompts hardly move at such rates", settings.learning_rate, LEAST_LEARNING_RATE
            )
        self.base, self.tuned, self.train, self.settings, self.stop = base, tuned, train, settings, stop
        parameters = list(tuned.parameters.values())
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay)
        with torch.no_grad():
            prefix = tuned.prefix()
        self.held_out, self.carried = validation_batches(base, validation, prefix), carried(base, prefix)
        self.lengths = [len(row) + self.carried for row in train]
        self.total = total_steps(self.lengths, settings)
        self.tokens: int | None = None  # of a part of a batch; None: a batch is one part
        self.began = False
        self.step, self.curve = 0, list[CurveRow]()
        self.best, self.best_loss, self.best_step, self.initial = self._copy(), float("inf"), 0, float("inf")

    def begin(self) -> None:
        self.initial = self.best_loss = validation_loss(self.base, self.tuned.prefix, self.held_out)
        self.began = True

    def go(self, on_step: OnStep, checkpoint: Checkpoint | None) -> None:
        settings = self.settings
        for step, (epoch, numbers) in enumerate(epoch_batches(self.lengths, settings), 1):
            if step <= self.step:
                continue
            if self._patience_is_over():
                logger.warning("no better validation loss in %s validations: stopped early at step %d", settings.patience, self.step)
                return
            rate = learning_rate_at(step, settings.learning_rate, settings.warmup_steps, self.total)
            self.optimizer.param_groups[0]["lr"] = rate
            loss = self._gradient([self.train[i] for i in numbers])
            if not loss < float("inf"):
                raise DivergedError("training loss", loss, step, rate, self.result())
            norm = torch.nn.utils.clip_grad_norm_(list(self.tuned.parameters.values()), settings.max_grad_norm)
            if not bool(torch.isfinite(norm)):
                raise DivergedError("gradient norm", norm.item(), step, rate, self.result())
            row = CurveRow(step=step, epoch=epoch, train_loss=loss, validation_loss=None, learning_rate=rate)
            with self.stop.held():
                self.optimizer.step()
                self.step = step
                self.curve.append(row)
            if step % settings.validate_every == 0 or step == self.total:
                self._validate(row)
            if is_first():
                on_step(row)
                if checkpoint is not None and checkpoint.due():
                    checkpoint.save(self.state())

    def state(self) -> State:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.tuned.parameters.items():
            tensors |= {f"parameter.{name}": parameter, f"best.{name}": self.best[name]}
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{moment}.{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq") if moment in moments}
        figures = {"best_loss": self.best_loss, "best_step": self.best_step, "initial": self.initial, "curve": self.curve}
        return State(self.step, tensors, figures)

    def restore(self, state: State) -> None:
        for name, parameter in self.tuned.parameters.items():
            with torch.no_grad():
                parameter.copy_(state.tensors[f"parameter.{name}"])
            self.best[name] = state.tensors[f"best.{name}"].to(parameter)
            if f"exp_avg.{name}" in state.tensors:
                moments = {moment: state.tensors[f"{moment}.{name}"].to(parameter) for moment in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(state.step)), **moments}
        self.step, self.curve = state.step, state.figures["curve"]
        self.best_loss, self.best_step, self.initial = (state.figures[key] for key in ("best_loss", "best_step", "initial"))
        self.began = True
        if self.curve and self._validates(self.step) and self.curve[-1]["validation_loss"] is None:
            self._validate(self.curve[-1])  # it was stopped between the update and its validation

    def result(self) -> TuneResult:
        best = {name: tensor.cpu() for name, tensor in self.tuned.released(self.best).items()}
        return TuneResult(best, self.curve, len(self.curve), self.best_step, self.best_loss, self.initial)

    def _validates(self, step: int) -> bool:
        return step > 0 and (step % self.settings.validate_every == 0 or step == self.total)

    def _validate(self, row: CurveRow) -> None:
        loss = validation_loss(self.base, self.tuned.prefix, self.held_out)
        if not loss < float("inf"):
            raise DivergedError("validation loss", loss, row["step"], row["learning_rate"], self.result())
        with self.stop.held():
            row["validation_loss"] = loss
            if loss < self.best_loss:
                self.best, self.best_loss, self.best_step = self._copy(), loss, row["step"]

    def _patience_is_over(self) -> bool:
        since = sum(row["validation_loss"] is not None and row["step"] > self.best_step for row in self.curve)
        return self.settings.patience is not None and since >= self.settings.patience

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.tuned.parameters.items()}

    def _gradient(self, rows: Sequence[EncodedRow]) -> float:
        """Leaves the gradient of the batch's loss in the parameters and returns the loss: the mean over the rows' answer tokens, nats.

        Where memory does not suffice, the batch goes through in parts, half as large each time: the same sum.
        """
        answers = sum(len(row.answer) for row in rows)
        mine = share(sorted(rows, key=len))
        while True:
            self.optimizer.zero_grad()
            lengths = [len(row) + self.carried for row in mine]
            parts = [list(range(len(mine)))] if self.tokens is None else by_tokens(range(len(mine)), lengths, self.tokens)
            try:
                loss = sum(self._part([mine[i] for i in part], answers) for part in parts if part)
            except RuntimeError as error:
                if not _is_want_of_memory(error):
                    raise
                most = max(sum(lengths[i] for i in part) for part in parts)
                if all(len(part) < 2 for part in parts):
                    raise StageError(
                        f"out of memory on a single row of {most} tokens after {self.tuned.size} virtual ones; lower preprocess.max_tokens "
                        "or tune.num_virtual_tokens, set tune.precision: bf16, or give the worker more memory"
                    ) from error
                self.tokens = most // 2
                logger.warning("out of memory: batches go through in parts of at most %d tokens from here on", self.tokens)
                continue
            total = torch.tensor(float(loss), dtype=torch.float64, device=self.base.device)
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.tuned.parameters.values()]
            add_up(total, *gradients)
            for parameter, gradient in zip(self.tuned.parameters.values(), gradients, strict=True):
                parameter.grad = gradient
            return float(total)

    def _part(self, rows: Sequence[EncodedRow], answers: int) -> float:
        arithmetic, prefix = family_of(self.base), self.tuned.prefix()
        losses = arithmetic.answer_losses(self.base, prefix, arithmetic.lay(self.base, prefix, rows))
        loss = losses.sum() / answers
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        return loss.item()


def _is_want_of_memory(error: RuntimeError) -> bool:
    """torch has a class of its own for accelerators, and words alone for the processor's memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def validation_batches(base: BaseModel, rows: Sequence[EncodedRow], prefix: Prefix | None) -> list[Laid]:
    """The validation split laid out after a prefix of this kind and size, once for all passes."""
    batches = sorted_batches(rows, VALIDATION_TOKENS, carried(base, prefix))
    return [family_of(base).lay(base, prefix, [rows[i] for i in numbers]) for numbers in batches]


@torch.no_grad()
def validation_loss(base: BaseModel, prefix: Callable[[], Prefix | None], batches: Sequence[Laid]) -> float:
    """Mean over all answer tokens of the batches, nats."""
    common = prefix()
    if common is not None and common.vectors is not None:
        common = family_of(base).run_prefix(base, common.vectors)  # once for all batches
    total = torch.tensor(float(sum(row_losses(base, common, batch).sum() for batch in share(batches))), dtype=torch.float64)
    total = total.to(base.device)
    add_up(total)
    return float(total) / sum(len(batch.targets) for batch in batches)
