"""The methods by name (`tune.method` in a prompt file), and the one entry to them."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch

from retune.config import Prompt, Tune
from retune.errors import BadInputError
from retune.inference.adapters import tuned_model, untrained_head
from retune.inference.base_model import BaseModel, set_threads
from retune.inference.encoding import Encoder, Rows
from retune.inference.examples import example_rows
from retune.inference.families import check_fits
from retune.inference.inputs import EncodedRow, encode_with_answers
from retune.prompt_tuning.checkpoints import Checkpoint, Stop
from retune.prompt_tuning.initial import initial_prompt
from retune.prompt_tuning.prefixes import EncodedPrompt, LayerPrefix, SoftPrompt
from retune.prompt_tuning.result import TuneResult
from retune.prompt_tuning.trainer import OnStep, Tuned, optimise, validation_batches, validation_loss
from retune.prompt_tuning.weights import AllWeights, WithHead, ia3, lora

__all__ = ["METHODS", "tune"]

logger = logging.getLogger(__name__)


def tune(
    base: BaseModel,
    prompt: Prompt,
    train_rows: Rows,
    validation_rows: Rows,
    on_step: OnStep = lambda _: None,
    checkpoint: Checkpoint | None = None,
    stop: Stop | None = None,
) -> TuneResult:
    """Tunes `prompt` by the method it names.

    train_rows, validation_rows: rows with the prompt's input fields and its target. on_step, checkpoint, stop: see `optimise`.
    RETUNE_THREADS sets torch's threads.

    Raises BadInputError for an empty split, a row that cannot be used, a layer that the model lacks or a method that its family does not
    offer, ConfigError for a setting that
    cannot be used, DivergedError (a StageError that holds the last good tensors) if the loss stops being finite.
    """
    set_threads()
    check_fits(base, prompt)
    settings = prompt.tune
    if settings.method in ("none", "few_shot"):
        alone, _ = tuned_model(base, prompt, {})
        examples = _examples(prompt, train_rows) if settings.method == "few_shot" else []
        validation = validation_batches(alone, _encode(base, prompt, 0, validation_rows, "validation", examples), None)
        loss = validation_loss(alone, lambda: None, validation)
        return TuneResult({}, [], 0, 0, loss, loss, examples)
    tuned = METHODS[settings.method](base, settings)
    if base.family == "encoder":
        tuned = WithHead(tuned, untrained_head(base, prompt))
    if base.family != "decoder":
        logger.warning("%s: the base model is an %s: without the fast path of decoders (no shared prefix)", prompt.name, base.family)
    train = _encode(base, prompt, tuned.size, train_rows, "train")
    validation_split = _encode(base, prompt, tuned.size, validation_rows, "validation")
    return optimise(tuned.base, tuned, train, validation_split, settings, on_step, checkpoint, stop)


def _start(base: BaseModel, settings: Tune) -> torch.Tensor:
    return initial_prompt(settings.init, base, settings.num_virtual_tokens, settings.seed, settings.init_text)


METHODS: Mapping[str, Callable[[BaseModel, Tune], Tuned]] = MappingProxyType(
    {
        "prompt_tuning": lambda base, s: SoftPrompt(base, _start(base, s)),
        "p_tuning": lambda base, s: EncodedPrompt(base, s.num_virtual_tokens, s.encoder_hidden_size, s.seed),
        "prefix_tuning": lambda base, s: LayerPrefix(base, _start(base, s)),
        "lora": lambda base, s: lora(base, s.lora_rank, s.lora_alpha, s.target_modules, s.seed),
        "ia3": lambda base, s: ia3(base, s.target_modules, s.seed),
        "full": lambda base, _: AllWeights(base),
    }
)
"""What each method tunes, at its start; `few_shot` and `none` tune nothing."""


def _encode(
    base: BaseModel, prompt: Prompt, soft: int, rows: Rows, split: str, examples: Sequence[Mapping[str, str]] = ()
) -> list[EncodedRow]:
    with _of_split(prompt, rows, split):
        return encode_with_answers(base, Encoder(prompt, base.tokenizer, base.family, examples), soft, rows)[0]


def _examples(prompt: Prompt, rows: Rows) -> list[dict[str, str]]:
    with _of_split(prompt, rows, "train"):
        return example_rows(prompt, rows)


@contextmanager
def _of_split(prompt: Prompt, rows: Rows, split: str) -> Iterator[None]:
    """Errors of a row name its split. Raises BadInputError for a split without rows."""
    if len(rows) == 0:
        raise BadInputError(f"{prompt.name}: the {split} split is empty; land more data or change preprocess.splits")
    try:
        yield
    except BadInputError as error:
        raise BadInputError(f"{prompt.name}: {split} split: {error}") from None
