"""Attention without padding: tokens of many rows laid end to end, each row after the same soft prompt.

The soft prompt is the same for every row and attention is causal, so its keys and values are computed once (a `Prefix`) and serve all
rows; every linear layer of the model sees real tokens only. Both are exact: the arithmetic is that of a row on its own.

Decoders are loaded with the attention implementation registered here. Handed no `retune=` pass they attend as with "sdpa", so that
transformers' and PEFT's own code computes the same on them.

Letters: H query heads, G key-value heads, D their size, T packed tokens, P virtual tokens, B rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from retune.inference.together import attend_together
from retune.inference.varlen import Sequences, has_kernel

__all__ = ["DENSE", "IMPLEMENTATION", "Decoding", "PackedRows", "Pass", "Prefix", "PrefixAndRows", "PrefixRun", "Rows"]

IMPLEMENTATION = "retune"
"""Name of the attention implementation."""
DENSE = 512
"""Tokens of a chunk, or virtual ones, up to which their scores are kept for the backward pass; more use torch's memory-saving attention."""


class Pass(Protocol):
    """One run of the model over packed tokens."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q: [H, T, D]; k, v: [G, T, D]. Returns [T, H, D]."""
        ...


@dataclass(frozen=True)
class Prefix:
    """What stands before every row: what the soft prompt leaves behind in the model, or what was tuned in its place (prefix tuning).

    Where attention looks ahead the soft prompt sees the row, so that nothing of it can be computed before, and where it changes with each
    step nothing is worth it: it is kept as it is."""

    keys: tuple[torch.Tensor, ...] = ()
    """Per layer [G, P, D]."""
    values: tuple[torch.Tensor, ...] = ()
    last: torch.Tensor | None = None
    """Hidden state of the last virtual token, [hidden size]: it predicts the first token of a row without a prompt. None where keys and
    values were given and no token was read."""
    vectors: torch.Tensor | None = None
    """The soft prompt itself, [P, hidden size], in place of keys and values: while it is tuned, and for a model with an encoder."""

    @property
    def size(self) -> int:
        """P."""
        return int(self.keys[0].shape[1]) if self.vectors is None else len(self.vectors)


@dataclass
class PrefixRun:
    """The run of the virtual tokens themselves: plain causal attention, its keys and values kept."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ARG002 - a Pass
        self.keys.append(k)
        self.values.append(v)
        k, v = _for_all_heads(q, k, v)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0].transpose(0, 1)


class Rows(Protocol):
    """Rows laid end to end. Chunks are whole rows that follow each other; each attends to the prefix and to itself."""

    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of each chunk; they add up to T."""
        ...

    @property
    def masks(self) -> Sequence[torch.Tensor]:
        """Per chunk of n tokens [n, P + n], of the model's type: 0 where a token may look, -inf elsewhere."""
        ...

    def sequences(self, with_prefix: bool = False) -> Sequences | None:
        """The same for a kernel that needs no masks; None where only masks say it."""
        ...


@dataclass
class PackedRows:
    """A run over rows."""

    prefix: Prefix | None
    rows: Rows
    kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    """A list to fill with each layer's keys and values, [G, T, D]; None: they are not kept."""

    @cached_property
    def _sequences(self) -> Sequences | None:
        return self.rows.sequences()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if self.kept is not None:
            self.kept.append((k, v))
        prefix = None if self.prefix is None else (self.prefix.keys[layer], self.prefix.values[layer])
        if has_kernel(q, k) and self._sequences is not None:
            if prefix is not None:
                k, v = torch.cat([prefix[0], k], 1), torch.cat([prefix[1], v], 1)
            return self._sequences.attend(q, k, v, scale)
        return _attend_rows(prefix, self.rows, q * scale, k, v)


@dataclass
class PrefixAndRows:
    """A run over the virtual tokens and, behind them, the rows that each follow them: what a training step needs, in one."""

    size: int
    """P: the first tokens."""
    rows: Rows

    @cached_property
    def _sequences(self) -> Sequences | None:
        return self.rows.sequences(with_prefix=True)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        sizes = self.rows.sizes
        if q.device.type == "cpu" and max(sizes, default=0) and max(self.size, *sizes) <= DENSE:
            return attend_together(q, k, v, scale, self.size, sizes, self.rows.masks)
        if has_kernel(q, k) and self._sequences is not None:
            return self._sequences.attend(q, k, v, scale)
        prefix = PrefixRun()
        split = [self.size, k.shape[1] - self.size]
        (first_q, q), (first_k, k), (first_v, v) = (torch.split(x, split, 1) for x in (q, k, v))
        first = prefix.attend(layer, first_q, first_k, first_v, scale)
        return torch.cat([first, _attend_rows((first_k, first_v), self.rows, q * scale, k, v)])


@dataclass
class Decoding:
    """A run over one new token per row, T = B. Each row looks at the prefix, at what it has read and written, and at itself."""

    prefix: Prefix | None
    keys: list[torch.Tensor]
    """Per layer [G, B, S, D], room for S tokens a row; the run writes its own."""
    values: list[torch.Tensor]
    lengths: torch.Tensor
    """Tokens that each row already has, [B]."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        heads, rows, size = q.shape
        groups = k.shape[0]
        lengths = self.lengths.to(q.device)
        at = torch.arange(rows, device=q.device)
        self.keys[layer][:, at, lengths], self.values[layer][:, at, lengths] = k, v
        room = int(self.lengths.max()) + 1
        own_keys, own_values = self.keys[layer][:, :, :room], self.values[layer][:, :, :room]
        queries = (q * scale).view(groups, -1, rows, size)  # [G, H/G, B, D]
        scores = queries.transpose(1, 2) @ own_keys.transpose(-1, -2)  # [G, B, H/G, S]
        unread = torch.arange(room, device=q.device) > lengths[:, None]  # [B, S]
        scores = scores.masked_fill(unread[:, None], float("-inf"))
        if self.prefix is None:
            out = scores.softmax(-1) @ own_values  # [G, B, H/G, D]
        else:
            keys, values = self.prefix.keys[layer], self.prefix.values[layer]  # [G, P, D]
            shared = queries.reshape(groups, -1, size) @ keys.transpose(1, 2)  # [G, H/G * B, P]
            shared = shared.view(groups, -1, rows, keys.shape[1]).transpose(1, 2)  # [G, B, H/G, P]
            weights = torch.cat([shared, scores], -1).softmax(-1)
            out = weights[..., keys.shape[1] :] @ own_values + weights[..., : keys.shape[1]] @ values[:, None]
        return out.permute(1, 0, 2, 3).reshape(rows, heads, size)


def _attend_rows(
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    rows: Rows,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """prefix: keys and values [G, P, D]; q: [H, T, D], scaled; k, v: [G, T, D]. Returns [T, H, D]."""
    k, v = _for_all_heads(q, k, v)
    before = None if prefix is None else _for_all_heads(q, *prefix)
    parts = []
    for queries, keys, values, mask in zip(*(torch.split(x, list(rows.sizes), 1) for x in (q, k, v)), rows.masks, strict=True):
        if before is not None:
            keys, values = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)
        parts.append(_attend(queries, keys, values, mask.to(q.device)).transpose(0, 1))
    return torch.cat(parts)


def _for_all_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values once per query head (grouped-query attention, arXiv:2305.13245)."""
    repeats = q.shape[0] // k.shape[0]
    return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q: [H, n, D], scaled; k, v: [H, P + n, D]; mask: [n, P + n]. Returns [H, n, D]."""
    if q.device.type == "cpu" and q.shape[1] <= DENSE:  # two matrix products: faster there than torch's fused kernel and its backward
        return torch.baddbmm(mask, q, k.transpose(1, 2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None, None], scale=1.0)[0]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    retune: Pass | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    if retune is None:
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **named)
        return attended, None
    layer: Any = module.layer_idx
    q, k, v = (x.squeeze(0) for x in (query, key, value))  # unlike x[0] it is a view backwards too
    return retune.attend(layer, q, k, v, scaling or q.shape[-1] ** -0.5)[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
