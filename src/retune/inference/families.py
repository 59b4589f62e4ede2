"""The families of base models behind one interface: each is a module with the same functions."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch

from retune.config import Prompt
from retune.errors import BadInputError
from retune.inference import decoder, encoder, encoder_decoder
from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel, Family
from retune.inference.inputs import EncodedRow, LabelTree

__all__ = ["Arithmetic", "Laid", "carried", "check_fits", "family_of", "generate_batch", "row_losses"]


class Laid(Protocol):
    """N rows as a family's model reads them, with their answers."""

    @property
    def targets(self) -> torch.Tensor:
        """What is to be predicted, [K]."""
        ...

    @property
    def owners(self) -> torch.Tensor:
        """Number of the row of each target, [K]."""
        ...

    @property
    def count(self) -> int:
        """N."""
        ...


class Arithmetic(Protocol):
    """What a family computes. `decoder` documents each function."""

    def run_prefix(self, base: BaseModel, soft_prompt: torch.Tensor) -> Prefix: ...
    def lay(self, base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow]) -> Any: ...
    def answer_losses(self, base: BaseModel, prefix: Prefix | None, laid: Any) -> torch.Tensor: ...
    def score_batch(self, base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow], tree: LabelTree) -> torch.Tensor: ...
    def generate_steps(
        self, base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow], max_new_tokens: int, temperature: float = 0.0
    ) -> Iterator[list[int | None]]: ...


_FAMILIES: Mapping[Family, Arithmetic] = MappingProxyType({"decoder": decoder, "encoder": encoder, "encoder-decoder": encoder_decoder})


def family_of(base: BaseModel) -> Arithmetic:
    return _FAMILIES[base.family]


def check_fits(base: BaseModel, prompt: Prompt) -> None:
    """Raises BadInputError for a task or a method that the base model's family does not offer."""
    kind = f"base model of type {base.model.config.model_type} ({base.family})"
    if base.family == "encoder" and prompt.task != "classification":
        raise BadInputError(f"{prompt.name}: task must be classification on a {kind}, which writes no text, got {prompt.task}")
    if base.family == "encoder" and prompt.tune.method == "few_shot":
        raise BadInputError(
            f"{prompt.name}: tune.method few_shot is not offered on a {kind}, which answers with its own classification head: "
            "nothing but tuning tells it what an answer is; use another method"
        )
    if base.family == "encoder-decoder" and prompt.tune.method == "prefix_tuning":
        raise BadInputError(
            f"{prompt.name}: tune.method prefix_tuning is not offered on a {kind}; use prompt_tuning, p_tuning, lora, ia3 or full"
        )


def carried(base: BaseModel, prefix: Prefix | None) -> int:
    """Virtual tokens that each row brings along: of a decoder none, they run once."""
    return 0 if base.family == "decoder" or prefix is None or prefix.vectors is None else prefix.size


@torch.no_grad()
def row_losses(base: BaseModel, prefix: Prefix | None, laid: Laid) -> np.ndarray:
    """Negative log-likelihood of each row's answer in nats, [N], fp64."""
    losses = family_of(base).answer_losses(base, prefix, laid)
    return np.bincount(laid.owners.cpu().numpy(), weights=losses.double().cpu().numpy(), minlength=laid.count)


def generate_batch(
    base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow], max_new_tokens: int, temperature: float = 0.0
) -> list[list[int]]:
    """Tokens that the model writes after each row, up to and without a stop token. Arguments as for `decoder.generate_steps`."""
    written: list[list[int]] = [[] for _ in rows]
    for tokens in family_of(base).generate_steps(base, prefix, rows, max_new_tokens, temperature):
        for text, token in zip(written, tokens, strict=True):
            if token is not None:
                text.append(token)
    return written
