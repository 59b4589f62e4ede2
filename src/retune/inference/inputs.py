"""From token ids to what the model reads: the one place that assembles inputs for training, evaluation and serving.

PEFT puts the virtual tokens before the pads of a left-padded row (`[soft][pad][text]`) and counts pads as positions: such a row differs
from the same row alone (peft issues 1093, 1212; tests/unit/inference/test_peft.py shows it). Here the soft prompt stands next to the text
on either side, and positions are counted over real tokens only, so that a padded row equals the row alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from retune.errors import BadInputError
from retune.inference.base_model import BaseModel
from retune.inference.encoding import Encoder, Rows, records

__all__ = ["IGNORED", "EncodedRow", "Inputs", "TokenBatch", "assemble", "check_length", "collate", "encode_with_answers", "sorted_batches"]

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class EncodedRow:
    prompt: Sequence[int]
    """Tokens of the rendered template."""
    answer: Sequence[int] = ()
    """Tokens of the answer, its end included; empty at serving."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class TokenBatch:
    ids: torch.Tensor
    """[B, T]; pads hold token 0, which nothing attends to."""
    mask: torch.Tensor
    """[B, T], 1 at real tokens."""
    labels: torch.Tensor
    """[B, T], the token itself at the answer's positions, else IGNORED."""
    side: Literal["left", "right"]
    """Where the pads are."""


@dataclass(frozen=True)
class Inputs:
    embeddings: torch.Tensor
    """[B, P+T, H]."""
    mask: torch.Tensor
    """[B, P+T], 1 at virtual and real tokens."""
    positions: torch.Tensor
    """[B, P+T], counted over real tokens; 0 at leading pads."""
    labels: torch.Tensor
    """[B, P+T]."""


def collate(rows: Sequence[EncodedRow], side: Literal["left", "right"], device: torch.device | None = None) -> TokenBatch:
    """Pads rows to the longest: left for generation and scoring, right for a loss."""
    width = max(len(row) for row in rows)
    ids, mask, labels = [], [], []
    for row in rows:
        pads = width - len(row)
        before, after = (pads, 0) if side == "left" else (0, pads)
        ids.append([0] * before + [*row.prompt, *row.answer] + [0] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
        labels.append([IGNORED] * (before + len(row.prompt)) + [*row.answer] + [IGNORED] * after)
    shape = (len(rows), width)
    tensors = [torch.tensor(x, dtype=torch.long, device=device).view(shape) for x in (ids, mask, labels)]
    return TokenBatch(tensors[0], tensors[1], tensors[2], side)


def assemble(base: BaseModel, soft_prompt: torch.Tensor | None, batch: TokenBatch) -> Inputs:
    """Puts the soft prompt directly before each row's first token: `[pad][soft][text]` or `[soft][text][answer][pad]`.

    soft_prompt: [P, H]; None: P = 0. Gradients flow into it.
    """
    rows, width = batch.ids.shape
    embeddings = base.embed(batch.ids)  # [B, T, H]
    mask, labels = batch.mask, batch.labels
    if soft_prompt is not None:
        size = soft_prompt.shape[0]
        soft = soft_prompt.to(embeddings.dtype).expand(rows, -1, -1)  # [P, H] -> [B, P, H]
        embeddings = torch.cat([soft, embeddings], 1)  # [B, P+T, H]
        labels = torch.cat([labels.new_full((rows, size), IGNORED), labels], 1)
        if batch.side == "left":
            # Both parts are there in the order soft, pad, text; each row takes them in the order pad, soft, text.
            pads = width - mask.sum(1, keepdim=True)  # [B, 1]
            at = torch.arange(size + width, device=mask.device).expand(rows, -1)  # [B, P+T]
            source = torch.where(at < pads, at + size, torch.where(at < pads + size, at - pads, at))
            embeddings = embeddings.gather(1, source[..., None].expand_as(embeddings))
            mask = (at >= pads).long()
        else:
            mask = torch.cat([mask.new_ones(rows, size), mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Inputs(embeddings, mask, positions, labels)


def check_length(number: int, row: EncodedRow, soft: int, new: int, context: int) -> None:
    """soft: P. new: tokens still to be generated or scored after the row. context: positions of the model.

    Raises BadInputError if the row needs more positions than the model has, or has nothing to read.
    """
    total = soft + len(row) + new
    if total > context:
        raise BadInputError(
            f"row {number}: prompt too long: {soft} virtual + {len(row.prompt)} prompt + {len(row.answer) + new} answer tokens = {total}, "
            f"but the model reads {context}; lower preprocess.max_tokens, tune.num_virtual_tokens or generation.max_new_tokens"
        )
    if soft + len(row.prompt) == 0:
        raise BadInputError(f"row {number}: the rendered template is empty; a template without soft prompt must give at least one token")


def encode_with_answers(base: BaseModel, encoder: Encoder, soft: int, rows: Rows) -> tuple[list[EncodedRow], list[int]]:
    """Rows with each of their references and the end of the sequence, as training and reference losses read them.

    soft: P. Returns (one encoded row per reference, number of the row that it belongs to). Raises BadInputError for a row that is too
    long or has no usable target.
    """
    end = [] if base.eos_id is None else [base.eos_id]
    table = records(rows)
    encoded, owners = [], []
    for number, (prompt, answers) in enumerate(zip(encoder.prompts(table), encoder.answers(table), strict=True)):
        encoded += [EncodedRow(prompt, [*answer, *end]) for answer in answers]
        owners += [number] * len(answers)
    for number, row in zip(owners, encoded, strict=True):
        check_length(number, row, soft, 0, base.context)
        if not row.answer:
            raise BadInputError(f"row {number}: the answer has no tokens, and the tokenizer has no end of sequence to write after it")
    return encoded, owners


def sorted_batches(rows: Sequence[EncodedRow], size: int) -> list[list[int]]:
    """Numbers of the rows in batches of like length.

    The order is that of length, then content: the same rows make the same batches, in whatever order they come.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), tuple(rows[i].prompt), tuple(rows[i].answer)))
    return [order[i : i + size] for i in range(0, len(order), size)]
