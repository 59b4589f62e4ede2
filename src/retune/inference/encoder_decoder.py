"""The arithmetic of an encoder-decoder (T5-type): the encoder reads the virtual tokens and the row, the decoder writes the answer.

It has no fast path: batches are padded on the right, behind everything that is read, and each row reads its own copy of the virtual
tokens. The mask hides the pads, so that a row reads the same alone and in any company.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

from retune.errors import BadInputError
from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel
from retune.inference.decoder import LOGITS, draw, generators
from retune.inference.inputs import EncodedRow, LabelTree

__all__ = ["Padded", "answer_losses", "generate_steps", "lay", "run_prefix", "score_batch"]

PADDING = -100


@dataclass(frozen=True)
class Padded:
    """N rows of S tokens, answers of A, in the rows' own order."""

    ids: torch.Tensor
    """[N, S]"""
    mask: torch.Tensor
    """[N, P + S]: 1 where there is a token."""
    answers: torch.Tensor
    """[N, A]; PADDING behind an answer's end."""
    targets: torch.Tensor
    """The answer tokens, [K]."""
    owners: torch.Tensor
    """Number of the row of each answer token, [K]."""
    count: int
    """N."""


def run_prefix(base: BaseModel, soft_prompt: torch.Tensor) -> Prefix:  # noqa: ARG001 - nothing of it can be computed before the rows
    """The soft prompt [P, H] as it is."""
    return Prefix(vectors=soft_prompt)


def lay(base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow]) -> Padded:
    """The rows after the virtual tokens that stand before each."""
    size = 0 if prefix is None else prefix.size
    ids = _padded([row.prompt for row in rows], 0, base.device)
    lengths = torch.tensor([size + len(row.prompt) for row in rows], device=base.device)
    answers = _padded([row.answer for row in rows], PADDING, base.device)
    there = answers != PADDING
    return Padded(
        ids=ids,
        mask=(torch.arange(size + ids.shape[1], device=base.device) < lengths[:, None]).long(),
        answers=answers,
        targets=answers[there],
        owners=there.nonzero()[:, 0],
        count=len(rows),
    )


def answer_losses(base: BaseModel, prefix: Prefix | None, laid: Padded) -> torch.Tensor:
    """Cross entropy of each answer token in nats, [K], fp32; gradients flow into the prefix and into weights that are tuned."""
    logits = _decode(base, _read(base, prefix, laid), laid.mask, laid.answers)
    return F.cross_entropy(logits[laid.answers != PADDING], laid.targets, reduction="none")


@torch.no_grad()
def score_batch(base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow], tree: LabelTree) -> torch.Tensor:
    """Log-probability of each label's tokens: [N, C], fp32. A row is read once and its labels are written side by side."""
    laid = lay(base, prefix, rows)
    states = _read(base, prefix, laid)
    labels = _padded(tree.labels, PADDING, base.device)  # [C, A]
    step = max(1, LOGITS // (labels.numel() * base.vocabulary))
    return torch.cat([_scores(base, states[i : i + step], laid.mask[i : i + step], labels) for i in range(0, len(rows), step)])


@torch.no_grad()
def generate_steps(
    base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow], max_new_tokens: int, temperature: float = 0.0
) -> Iterator[list[int | None]]:
    """One token per row and step as it is written; None once a row has ended. Arguments as for `decoder.generate_steps`."""
    laid = lay(base, prefix, rows)
    states = BaseModelOutput(last_hidden_state=_read(base, prefix, laid))
    draws = generators(rows) if temperature > 0 else []
    tokens, cache, done = [_start(base)] * len(rows), None, [False] * len(rows)
    for _ in range(max_new_tokens):
        last = torch.tensor(tokens, device=base.device)[:, None]
        out: Any = base.model(
            encoder_outputs=states, attention_mask=laid.mask, decoder_input_ids=last, past_key_values=cache, use_cache=True
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        tokens = draw(logits, temperature, draws) if draws else logits.argmax(-1).tolist()
        done = [ended or token in base.stop_ids for ended, token in zip(done, tokens, strict=True)]
        yield [None if ended else token for ended, token in zip(done, tokens, strict=True)]
        if all(done):
            return


def _read(base: BaseModel, prefix: Prefix | None, laid: Padded) -> torch.Tensor:
    """The encoder's last hidden states, [N, P + S, H]."""
    vectors = base.embed(laid.ids)
    if prefix is not None:
        if prefix.vectors is None:
            raise BadInputError("an encoder-decoder takes virtual tokens before a row, not keys and values")
        vectors = torch.cat([prefix.vectors.to(base.dtype).expand(len(vectors), -1, -1), vectors], 1)
    out: Any = base.model.get_encoder()(inputs_embeds=vectors, attention_mask=laid.mask)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


def _decode(base: BaseModel, states: torch.Tensor, mask: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Logits before each answer token, [N, A, V], fp32."""
    start = answers.new_full((len(answers), 1), _start(base))
    inputs = torch.cat([start, answers[:, :-1].clamp(min=0)], 1)  # behind an answer's end anything may be read: nothing looks back at it
    out: Any = base.model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, decoder_input_ids=inputs, use_cache=False
    )
    logits: torch.Tensor = out.logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _scores(base: BaseModel, states: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n, C]"""
    rows, count = len(states), len(labels)
    answers = labels.repeat(rows, 1)  # [n * C, A]
    logits = _decode(base, states.repeat_interleave(count, 0), mask.repeat_interleave(count, 0), answers)
    losses = F.cross_entropy(logits.transpose(1, 2), answers, ignore_index=PADDING, reduction="none")
    return -losses.sum(1).view(rows, count)


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> torch.Tensor:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long, device=device).view(len(rows), width)


def _start(base: BaseModel) -> int:
    return int(base.model.config.decoder_start_token_id)
