"""The methods by name (`tune.method` in a prompt file), and the one entry to them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from retune.config import Prompt, Tune
from retune.errors import BadInputError
from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel, set_threads
from retune.inference.encoding import Encoder, Rows
from retune.inference.inputs import EncodedRow, encode_with_answers
from retune.inference.scoring import run_prefix
from retune.prompt_tuning.checkpoints import Checkpoint, Stop
from retune.prompt_tuning.initial import initial_prompt
from retune.prompt_tuning.result import TuneResult
from retune.prompt_tuning.trainer import OnStep, Tuned, optimise, validation_batches, validation_loss

__all__ = ["METHODS", "SoftPrompt", "tune"]


class SoftPrompt:
    """Prompt tuning (arXiv:2104.08691): P vectors before every row, tuned as they are."""

    def __init__(self, base: BaseModel, start: torch.Tensor) -> None:
        """start: [P, H], left as it is."""
        self.base, self.values = base, start.detach().clone().requires_grad_(True)
        self.parameters = {"prompt_embeddings": self.values}
        self.size = len(start)

    def prefix(self) -> Prefix | None:
        return run_prefix(self.base, self.values)


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

    Raises BadInputError for an empty split or a row that cannot be used, ConfigError for a setting that cannot, DivergedError (a
    StageError that holds the last good prompt) if the loss stops being finite.
    """
    set_threads()
    settings = prompt.tune
    if settings.method == "none":
        validation = validation_batches(base, _encode(base, prompt, 0, validation_rows, "validation"), 0)
        loss = validation_loss(base, lambda: None, validation)
        return TuneResult({}, [], 0, 0, loss, loss)
    tuned = METHODS[settings.method](base, settings)
    train = _encode(base, prompt, tuned.size, train_rows, "train")
    validation_split = _encode(base, prompt, tuned.size, validation_rows, "validation")
    return optimise(base, tuned, train, validation_split, settings, on_step, checkpoint, stop)


def _prompt_tuning(base: BaseModel, settings: Tune) -> Tuned:
    return SoftPrompt(base, initial_prompt(settings.init, base, settings.num_virtual_tokens, settings.seed, settings.init_text))


METHODS: Mapping[str, Callable[[BaseModel, Tune], Tuned]] = MappingProxyType({"prompt_tuning": _prompt_tuning})
"""What each method tunes, at its start; `none` tunes nothing."""


def _encode(base: BaseModel, prompt: Prompt, soft: int, rows: Rows, split: str) -> list[EncodedRow]:
    if len(rows) == 0:
        raise BadInputError(f"{prompt.name}: the {split} split is empty; land more data or change preprocess.splits")
    try:
        return encode_with_answers(base, Encoder(prompt, base.tokenizer), soft, rows)[0]
    except BadInputError as error:
        raise BadInputError(f"{prompt.name}: {split} split: {error}") from None
