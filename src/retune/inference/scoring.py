"""The model's arithmetic: losses over answers, log-probabilities of labels, generation. No text, no files.

The output embedding runs at the positions that are asked for only.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from retune.inference.base_model import BaseModel
from retune.inference.inputs import IGNORED, EncodedRow, Inputs, TokenBatch, assemble, collate

__all__ = ["answer_losses", "generate_batch", "logits_at", "prefill", "row_losses", "score_batch"]


def answer_losses(base: BaseModel, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each answer token, in nats.

    inputs: right-padded, with labels. Returns (losses [K], row of each [K]); gradients flow into the soft prompt.
    """
    hidden = base.model.base_model(
        inputs_embeds=inputs.embeddings, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=False
    ).last_hidden_state  # [B, P+T, H]
    targets = inputs.labels[:, 1:]
    chosen = targets != IGNORED  # position t predicts token t + 1
    losses = F.cross_entropy(logits_at(base, hidden[:, :-1][chosen]), targets[chosen], reduction="none")
    return losses, chosen.nonzero()[:, 0]


@torch.no_grad()
def row_losses(base: BaseModel, soft_prompt: torch.Tensor | None, batch: TokenBatch) -> np.ndarray:
    """Negative log-likelihood of each row's answer in nats, [B], fp64. batch: right-padded, with labels."""
    losses, owner = answer_losses(base, assemble(base, soft_prompt, batch))
    return np.bincount(owner.cpu().numpy(), weights=losses.double().cpu().numpy(), minlength=batch.ids.shape[0])


def logits_at(base: BaseModel, hidden: torch.Tensor) -> torch.Tensor:
    """hidden: [..., H] -> [..., V], fp32."""
    logits: torch.Tensor = base.model.get_output_embeddings()(hidden)
    return logits.float()


def prefill(base: BaseModel, inputs: Inputs) -> tuple[torch.Tensor, Any]:
    """Runs left-padded inputs. Returns (last hidden state [B, H], key-value cache of P+T positions)."""
    out = base.model.base_model(inputs_embeds=inputs.embeddings, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=True)
    return out.last_hidden_state[:, -1], out.past_key_values


@torch.no_grad()
def score_batch(
    base: BaseModel, soft_prompt: torch.Tensor | None, rows: Sequence[EncodedRow], labels: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Log-probability of each label's tokens after each row: [B, C], fp32.

    The rows run once; labels of several tokens then run on B x C copies of the cache.
    """
    inputs = assemble(base, soft_prompt, collate(rows, "left", base.device))
    last, cache = prefill(base, inputs)
    first = logits_at(base, last).log_softmax(-1)  # [B, V]
    scores = first[:, torch.tensor([label[0] for label in labels], device=base.device)].clone()  # [B, C]
    if max(len(label) for label in labels) > 1:
        scores += _score_tails(base, inputs, cache, labels)
    return scores


def _score_tails(base: BaseModel, inputs: Inputs, cache: Any, labels: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probability of each label's tokens after its first: [B, C]. `cache` is used up."""
    rows, count, device = inputs.mask.shape[0], len(labels), base.device
    tails = collate([EncodedRow(label[:-1]) for label in labels], "right", device)  # what is read, [C, M]
    targets = collate([EncodedRow((), label[1:]) for label in labels], "right", device).labels.repeat(rows, 1)  # what it predicts, [B*C, M]
    width = tails.ids.shape[1]
    cache.batch_repeat_interleave(count)
    mask = torch.cat([inputs.mask.repeat_interleave(count, 0), tails.mask.repeat(rows, 1)], 1)  # [B*C, P+T+M]
    positions = inputs.positions[:, -1:].repeat_interleave(count, 0) + 1 + torch.arange(width, device=device)  # [B*C, M]
    # Pads of a shorter label come after all that counts: they need a position that exists, no more.
    positions = positions.clamp(max=base.context - 1)
    hidden = base.model.base_model(
        inputs_embeds=base.embed(tails.ids.repeat(rows, 1)),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # [B*C, M, H]
    chosen = targets != IGNORED
    found = -F.cross_entropy(logits_at(base, hidden[chosen]), targets[chosen], reduction="none")
    return torch.zeros(rows * count, device=device).index_add_(0, chosen.nonzero()[:, 0], found).view(rows, count)


@torch.no_grad()
def generate_batch(
    base: BaseModel, soft_prompt: torch.Tensor | None, rows: Sequence[EncodedRow], max_new_tokens: int, temperature: float = 0.0
) -> list[list[int]]:
    """Tokens that the model writes after each row, up to and without a stop token.

    temperature: 0 takes the likeliest token; above 0, tokens are drawn by a generator seeded by the row's own tokens, so that a row's
    text depends neither on its batch nor on what ran before.

    The loop is Retune's own: `generate` of transformers takes sampling and penalties from the base model's generation settings, which
    are no part of a release.
    """
    inputs = assemble(base, soft_prompt, collate(rows, "left", base.device))
    last, cache = prefill(base, inputs)
    mask, positions = inputs.mask, inputs.positions[:, -1:]
    draws = [_generator(row) for row in rows] if temperature > 0 else []
    written: list[list[int]] = [[] for _ in rows]
    done = [False] * len(rows)
    for step in range(max_new_tokens):
        logits = logits_at(base, last)  # [B, V]
        tokens = _draw(logits, temperature, draws) if draws else logits.argmax(-1).tolist()
        for i, token in enumerate(tokens):
            done[i] = done[i] or token in base.stop_ids
            if not done[i]:
                written[i].append(token)
        if all(done) or step == max_new_tokens - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        positions = positions + 1
        out = base.model.base_model(
            inputs_embeds=base.embed(torch.tensor(tokens, device=base.device)[:, None]),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        last = out.last_hidden_state[:, -1]
    return written


def _generator(row: EncodedRow) -> torch.Generator:
    digest = hashlib.sha256(" ".join(map(str, row.prompt)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _draw(logits: torch.Tensor, temperature: float, generators: Sequence[torch.Generator]) -> list[int]:
    """logits: [B, V] -> one token per row."""
    shares = (logits / temperature).softmax(-1).cpu()
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(shares, generators, strict=True)]
