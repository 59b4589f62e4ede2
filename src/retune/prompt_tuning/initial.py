"""Where a soft prompt starts from. Each function returns [P, H] in fp32 on the model's device."""

import re
from typing import Literal

import torch

from retune.errors import ConfigError
from retune.inference.base_model import BaseModel
from retune.inference.encoding import plain_tokenizer

__all__ = ["from_sampled_vocabulary", "from_text", "initial_prompt", "random_values"]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def initial_prompt(
    init: Literal["text", "sampled_vocabulary", "random"], base: BaseModel, size: int, seed: int, text: str | None = None
) -> torch.Tensor:
    """size: P. text: for `text` only. The same arguments give the same bytes.

    Raises ConfigError if `text` is needed and has no tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    if init == "text":
        return from_text(base, size, text or "")
    if init == "sampled_vocabulary":
        return from_sampled_vocabulary(base, size, generator)
    return random_values(base, size, generator)


def from_text(base: BaseModel, size: int, text: str) -> torch.Tensor:
    """Embeddings of the text's tokens, repeated or cut to P."""
    ids = plain_tokenizer(base.tokenizer).encode(text, add_special_tokens=False).ids
    if not ids:
        raise ConfigError(f"init: text needs init_text with at least one token, got {text!r}")
    return _embeddings(base, torch.tensor((ids * (size // len(ids) + 1))[:size]))


def from_sampled_vocabulary(base: BaseModel, size: int, generator: torch.Generator) -> torch.Tensor:
    """Embeddings of P different tokens (repeated where the vocabulary is smaller), neither special ones nor single fallback bytes."""
    added = base.tokenizer.added_tokens_decoder
    special = {*base.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    ids = torch.tensor(sorted(i for token, i in base.tokenizer.get_vocab().items() if i not in special and not _BYTE.fullmatch(token)))
    order = torch.randperm(len(ids), generator=generator).repeat(size // len(ids) + 1)[:size]
    return _embeddings(base, ids[order])


def random_values(base: BaseModel, size: int, generator: torch.Generator) -> torch.Tensor:
    """Normal values around the mean of the token embeddings, with their deviation in each dimension.

    Measured to tune worse than the other two (about 3x, peft issue 2816): such vectors are none that the model has seen.
    """
    count = base.model.get_input_embeddings().weight.shape[0]
    table = base.embed(torch.arange(count, device=base.device)).float()  # [V, H]
    noise = torch.randn(size, base.hidden_size, generator=generator).to(base.device)
    return table.mean(0) + noise * table.std(0)


def _embeddings(base: BaseModel, ids: torch.Tensor) -> torch.Tensor:
    return base.embed(ids.to(base.device)).detach().float().clone()
