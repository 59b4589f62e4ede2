"""The arithmetic of a decoder: losses over answers, log-probabilities of labels, generation. No text, no files.

The output embedding runs at the positions that are asked for only.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from retune.errors import BadInputError
from retune.inference.attention import IMPLEMENTATION, Decoding, PackedRows, Pass, Prefix, PrefixAndRows, PrefixRun
from retune.inference.base_model import BaseModel
from retune.inference.inputs import EncodedRow, LabelTree, Packed, pack
from retune.inference.lean import Asked, make_lean

__all__ = [
    "LOGITS",
    "answer_losses",
    "draw",
    "generate_steps",
    "generators",
    "lay",
    "logits_at",
    "run_packed",
    "run_pass",
    "run_prefix",
    "score_batch",
]

LOGITS = 2**24
"""Logits that are held at a time: 64 MiB of fp32."""
TOKENS = 4096
"""Tokens of a vocabulary that the loss takes at a time, and rows of a bf16 output embedding that are widened: what is multiplied stays
near the processor."""


def run_prefix(base: BaseModel, soft_prompt: torch.Tensor) -> Prefix:
    """Runs the soft prompt [P, H] through the frozen model; gradients flow into it."""
    run = PrefixRun()
    vectors = soft_prompt.to(base.dtype)
    positions = base.first_position + torch.arange(len(vectors), device=vectors.device)
    hidden = run_pass(base, vectors, positions, run, torch.tensor([len(vectors) - 1]))
    return Prefix(tuple(run.keys), tuple(run.values), hidden[-1])


def lay(base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow]) -> Packed:
    """The rows as they follow the prefix, with their answers."""
    return pack(rows, 0 if prefix is None else prefix.size, base.device, dtype=base.dtype)


def run_packed(
    base: BaseModel,
    prefix: Prefix | None,
    packed: Packed,
    kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    asked: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states of all tokens, [T, H]. kept: filled with each layer's keys and values. asked: as for `run_pass`."""
    return run_pass(base, base.embed(packed.ids), packed.positions, PackedRows(prefix, packed, kept), asked)


def _run_together(base: BaseModel, soft_prompt: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Hidden states of the soft prompt [P, H], then of all tokens: [P + T, H]. Those that predict no answer may be anything."""
    size = len(soft_prompt)
    tokens = base.embed(packed.ids)
    vectors = torch.cat([soft_prompt.to(tokens.dtype), tokens])
    positions = torch.cat([torch.arange(size, device=base.device), packed.positions])
    return run_pass(base, vectors, positions, PrefixAndRows(size, packed), packed.sources + size)


def answer_losses(base: BaseModel, prefix: Prefix | None, packed: Packed) -> torch.Tensor:
    """Cross entropy of each answer token in nats, [K], fp32; gradients flow into the prefix and into weights that are tuned.

    A soft prompt as it is runs with the rows, in one. Raises BadInputError for a row without a prompt after a prefix that predicts nothing.
    """
    if prefix is not None and prefix.vectors is not None:
        hidden = _run_together(base, prefix.vectors, packed).index_select(0, packed.sources + len(prefix.vectors))
    else:
        hidden = _at(prefix, _hidden(base, prefix, packed, packed.sources), packed.sources)
    weight, bias = _head(base)
    hidden, targets = hidden.to(weight.device), packed.targets.to(weight.device)  # of a sharded model it may lie elsewhere
    if weight.requires_grad and torch.is_grad_enabled():  # the output embedding learns too: all logits are kept for its gradient
        logits = F.linear(hidden, weight.to(hidden.dtype), bias)
        losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
    else:
        losses = _HeadLoss.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return losses.to(base.device)


def logits_at(base: BaseModel, hidden: torch.Tensor) -> torch.Tensor:
    """hidden: [..., H] -> [..., V], fp32. Without gradients where the output embedding is bf16 and hidden is not."""
    weight, bias = _head(base)
    logits = _logits(hidden.reshape(-1, hidden.shape[-1]).to(weight.device), weight, bias)
    return logits.view(*hidden.shape[:-1], len(weight)).float().to(base.device)


@torch.no_grad()
def score_batch(base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow], tree: LabelTree) -> torch.Tensor:
    """Log-probability of each label's tokens after each row: [N, C], fp32.

    One run: each row is followed by the tree of all labels, so that neither a row nor a common beginning is read twice.
    """
    packed = pack(rows, 0 if prefix is None else prefix.size, base.device, tree, base.dtype)
    nodes = torch.from_numpy(np.arange(1, len(tree) + 1)).to(base.device)
    # A row without a prompt is followed by its nodes all the same: they stand where the rows in packed order say.
    starts = _tree_starts(rows, packed, len(tree)).to(base.device)
    places = torch.cat([packed.ends[:, None], starts[:, None] + nodes - 1], 1)  # [N, 1 + S]
    hidden = _hidden(base, prefix, packed, places)
    source, target, label = (torch.from_numpy(x).to(base.device) for x in (tree.source, tree.target, tree.label))
    scores = torch.zeros(len(rows), int(label.max()) + 1, device=base.device)
    step = max(1, LOGITS // (places.shape[1] * base.vocabulary))
    for start in range(0, len(rows), step):
        part = places[start : start + step]
        logits = logits_at(base, _at(prefix, hidden, part.reshape(-1))).view(*part.shape, -1)  # [n, 1 + S, V]
        found = logits[:, source, target] - logits.logsumexp(-1)[:, source]  # [n, K]
        scores[start : start + step].index_add_(1, label, found)
    return scores


@torch.no_grad()
def generate_steps(
    base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow], max_new_tokens: int, temperature: float = 0.0
) -> Iterator[list[int | None]]:
    """One token per row and step as it is written; None once a row has ended.

    temperature: 0 takes the likeliest token; above 0, tokens are drawn by a generator seeded by the row's own tokens, so that a row's
    text depends neither on its batch nor on what ran before.

    The loop is Retune's own: `generate` of transformers takes sampling and penalties from the base model's generation settings, which
    are no part of a release.
    """
    size = 0 if prefix is None else prefix.size
    packed = lay(base, prefix, rows)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    hidden = _hidden(base, prefix, packed, packed.ends, kept)
    last = _at(prefix, hidden, packed.ends)  # [N, H]
    lengths = torch.tensor([len(row.read) for row in rows], device=base.device)
    cache = _room(base, prefix, kept, packed, lengths, max_new_tokens)
    draws = generators(rows) if temperature > 0 else []
    done = [False] * len(rows)
    for step in range(max_new_tokens):
        logits = logits_at(base, last)  # [N, V]
        tokens = draw(logits, temperature, draws) if draws else logits.argmax(-1).tolist()
        done = [ended or token in base.stop_ids for ended, token in zip(done, tokens, strict=True)]
        yield [None if ended else token for ended, token in zip(done, tokens, strict=True)]
        if all(done) or step == max_new_tokens - 1:
            return
        vectors = base.embed(torch.tensor(tokens, device=base.device))
        last = run_pass(base, vectors, size + lengths, Decoding(prefix, *cache, lengths))
        lengths = lengths + 1


class _HeadLoss(torch.autograd.Function):
    """Cross entropy under a frozen output embedding. The gradient is computed with the loss, as arXiv:2410.10989 does."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, LOGITS // TOKENS)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            own = None if gradient is None else gradient[part]
            losses[part] = _cross_entropy(hidden[part], weight, bias, targets[part], own)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None


def _cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, gradient: torch.Tensor | None
) -> torch.Tensor:
    """Losses [n] of hidden [n, H] under weight [V, H]; their gradients are written to `gradient` [n, H], if any.

    One pass over the output embedding, some of its tokens at a time, with the normaliser found on the way (arXiv:1805.02867) and so the
    mean of the embeddings. A target stands against all other tokens together, so that no share near 1 is subtracted from 1.
    """
    kind = torch.promote_types(hidden.dtype, torch.float32)
    nothing = torch.finfo(kind).min
    largest = hidden.new_full((len(hidden), 1), nothing, dtype=kind)  # of the other tokens' logits
    total = torch.zeros_like(largest)  # of their exponentials, over that of the largest
    target = torch.full_like(largest, float("nan"))  # stays so where the vocabulary has no such token
    mean = None if gradient is None else torch.zeros_like(gradient, dtype=kind)
    for first in range(0, len(weight), TOKENS):
        some = slice(first, first + TOKENS)
        vectors = weight[some].to(hidden.dtype)
        logits = F.linear(hidden, vectors, None if bias is None else bias[some].to(hidden.dtype)).to(kind)
        places = targets[:, None] - first
        inside = (places >= 0) & (places < len(vectors))
        places = places.clamp(0, len(vectors) - 1)
        own = logits.gather(1, places)
        target = torch.where(inside, own, target)
        logits.scatter_(1, places, own.masked_fill(inside, nothing))
        before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
        faded, shares = (before - largest).exp_(), logits.sub_(largest).exp_()
        total = total.mul_(faded).add_(shares.sum(1, keepdim=True))
        if mean is not None:
            mean.mul_(faded).add_(shares.to(hidden.dtype) @ vectors)
    odds = largest + total.log() - target  # logarithm of those against the target
    if gradient is not None and mean is not None:
        gradient.copy_(mean.div_(total).sub_(weight.index_select(0, targets)).mul_(odds.sigmoid()))
    return torch.logaddexp(odds, torch.zeros_like(odds))[:, 0]


_NO_MASK = torch.zeros(1, 1, 1, 1)
"""A mask of four dimensions is passed through by transformers: none is built, the pass has its own."""


def run_pass(
    base: BaseModel, vectors: torch.Tensor, positions: torch.Tensor, over: Pass, asked: torch.Tensor | None = None
) -> torch.Tensor:
    """One run of the frozen model. vectors: [T, H]; positions: [T]. Returns the hidden states [T, H].

    asked: places of a decoder's hidden states that will be read, any shape, negative ones apart; the others may be anything.
    """
    model = base.model
    if model.config._attn_implementation != IMPLEMENTATION:
        model.set_attn_implementation(IMPLEMENTATION)
        if base.family == "decoder":
            make_lean(model)
    if asked is not None:
        places = torch.unique(asked[asked >= 0])
        if 0 < 2 * len(places) <= len(vectors):  # keys and values of all, then queries and all else of these, cost less than all of all
            over = Asked(over, places)
    out = model.base_model(inputs_embeds=vectors[None], position_ids=positions[None], attention_mask=_NO_MASK, use_cache=False, retune=over)
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden.to(base.device)  # a sharded model leaves it where its last layer is


def _head(base: BaseModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [V, H] and bias [V] of the output embedding."""
    head = base.model.get_output_embeddings()
    return head.weight, head.bias


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden: [n, H] -> [n, V]"""
    if weight.dtype == hidden.dtype:
        return F.linear(hidden, weight, bias)
    logits = hidden.new_empty(len(hidden), len(weight))
    for own, part in zip(torch.split(logits, TOKENS, 1), torch.split(weight, TOKENS), strict=True):
        torch.mm(hidden, part.to(hidden.dtype).T, out=own)
    return logits if bias is None else logits.add_(bias)


def _hidden(
    base: BaseModel,
    prefix: Prefix | None,
    packed: Packed,
    asked: torch.Tensor,
    kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """`run_packed`, of no tokens too."""
    if not len(packed.ids):
        return packed.ids.new_empty((0, base.hidden_size), dtype=base.dtype)
    return run_packed(base, prefix, packed, kept, asked)


def _at(prefix: Prefix | None, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """hidden: [T, H] -> [K, H]; place -1 is the prefix's last token."""
    if prefix is not None and prefix.last is None and bool((places < 0).any()):
        raise BadInputError("a row's rendered template is empty; with tune.method prefix_tuning it must give at least one token")
    if prefix is not None and prefix.last is not None:
        return torch.cat([prefix.last[None].to(hidden.device), hidden]).index_select(0, places + 1)
    return hidden.index_select(0, places)


def _tree_starts(rows: Sequence[EncodedRow], packed: Packed, nodes: int) -> torch.Tensor:
    """Place of the first node after each row, in the rows' own order, [N]."""
    starts, at = torch.zeros(len(rows), dtype=torch.long), 0
    for number in packed.order:
        starts[number] = at + len(rows[number].read)
        at += len(rows[number].read) + nodes
    return starts


def _room(
    base: BaseModel,
    prefix: Prefix | None,
    kept: list[tuple[torch.Tensor, torch.Tensor]],
    packed: Packed,
    lengths: torch.Tensor,
    more: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each layer's keys and values of the rows, with room for `more` tokens each: two lists of [G, N, S, D]."""
    if not kept and prefix is not None:  # rows without a token: nothing was read
        kept = [(k[:, :0], v[:, :0]) for k, v in zip(prefix.keys, prefix.values, strict=True)]
    rows = torch.repeat_interleave(torch.tensor(packed.order, device=base.device), lengths[list(packed.order)])  # [T]
    places = packed.positions - (0 if prefix is None else prefix.size)  # [T]
    caches: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for layer in kept:
        for cache, found in zip(caches, layer, strict=True):
            room = found.new_zeros(found.shape[0], len(lengths), int(lengths.max()) + more, found.shape[2])
            room[:, rows.to(found.device), places.to(found.device)] = found
            cache.append(room)
    return caches


def generators(rows: Sequence[EncodedRow]) -> list[torch.Generator]:
    """One per row, seeded by the row's own tokens."""
    digests = [hashlib.sha256(" ".join(map(str, row.prompt)).encode()).digest() for row in rows]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]


def draw(logits: torch.Tensor, temperature: float, generators: Sequence[torch.Generator]) -> list[int]:
    """logits: [B, V] -> one token per row."""
    shares = (logits / temperature).softmax(-1).cpu()
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(shares, generators, strict=True)]
