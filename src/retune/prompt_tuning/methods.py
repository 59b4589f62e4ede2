"""The methods by name (`tune.method` in a prompt file), and the one entry to them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from retune.config import Prompt
from retune.errors import BadInputError
from retune.inference.base_model import BaseModel, set_threads
from retune.inference.encoding import Encoder, Rows
from retune.inference.inputs import EncodedRow, encode_with_answers
from retune.prompt_tuning.initial import initial_prompt
from retune.prompt_tuning.result import TuneResult
from retune.prompt_tuning.trainer import OnStep, optimise, validation_batches, validation_loss

__all__ = ["METHODS", "Method", "tune"]

Method = Callable[[BaseModel, Prompt, Rows, Rows, OnStep], TuneResult]
"""(base model, prompt, training rows, validation rows, on_step) -> result."""


def tune(base: BaseModel, prompt: Prompt, train_rows: Rows, validation_rows: Rows, on_step: OnStep = lambda _: None) -> TuneResult:
    """Tunes `prompt` by the method it names.

    train_rows, validation_rows: rows with the prompt's input fields and its target. on_step: called after each optimizer step.
    RETUNE_THREADS sets torch's threads.

    Raises BadInputError for an empty split or a row that cannot be used, ConfigError for a setting that cannot, DivergedError (a
    StageError that holds the last good prompt) if the loss stops being finite.
    """
    set_threads()
    return METHODS[prompt.tune.method](base, prompt, train_rows, validation_rows, on_step)


def _prompt_tuning(base: BaseModel, prompt: Prompt, train_rows: Rows, validation_rows: Rows, on_step: OnStep) -> TuneResult:
    settings = prompt.tune
    size = settings.num_virtual_tokens
    train = _encode(base, prompt, size, train_rows, "train")
    validation = _encode(base, prompt, size, validation_rows, "validation")
    start = initial_prompt(settings.init, base, size, settings.seed, settings.init_text)
    return optimise(
        base,
        start,
        train,
        validation,
        learning_rate=settings.learning_rate,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        validate_every=settings.validate_every,
        seed=settings.seed,
        on_step=on_step,
    )


def _none(base: BaseModel, prompt: Prompt, train_rows: Rows, validation_rows: Rows, on_step: OnStep) -> TuneResult:  # noqa: ARG001 - a Method
    """The template alone: nothing is tuned, the validation loss is measured."""
    loss = validation_loss(base, None, validation_batches(base, _encode(base, prompt, 0, validation_rows, "validation"), 0))
    return TuneResult(None, [], 0, 0, loss, loss)


METHODS: Mapping[str, Method] = MappingProxyType({"prompt_tuning": _prompt_tuning, "none": _none})


def _encode(base: BaseModel, prompt: Prompt, soft: int, rows: Rows, split: str) -> list[EncodedRow]:
    if len(rows) == 0:
        raise BadInputError(f"{prompt.name}: the {split} split is empty; land more data or change preprocess.splits")
    try:
        return encode_with_answers(base, Encoder(prompt, base.tokenizer), soft, rows)[0]
    except BadInputError as error:
        raise BadInputError(f"{prompt.name}: {split} split: {error}") from None
