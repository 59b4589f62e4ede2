"""Attention of a training step on a CPU: virtual tokens and, behind them, rows that each look at them and at themselves.

The same arithmetic as chunk by chunk under autograd (`attention.PrefixAndRows`), whose backward holds a copy of the prefix's keys and
values for each chunk and adds their gradients up one tensor at a time. Here they are laid out again as they are needed.

Letters: H query heads, G key-value heads, R = H/G, D their size, T all tokens, P virtual ones, n those of a chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["attend_together"]


def attend_together(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, size: int, sizes: Sequence[int], masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """q: [H, T, D]; k, v: [G, T, D]; size: P; sizes: tokens of each chunk; masks: of each [n, P + n], 0 or -inf. Returns [T, H, D]."""
    causal = torch.full((size, size), float("-inf"), dtype=q.dtype).triu_(1)
    out: torch.Tensor = _Together.apply(q, k, v, scale, (size, *sizes), (causal, *masks))  # type: ignore[no-untyped-call]
    return out


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        sizes: Sequence[int],
        masks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """sizes, masks: the virtual tokens' first."""
        out = torch.empty_like(q.transpose(0, 1), memory_format=torch.contiguous_format)
        weights = []
        for (own, keys, values), mask in zip(_laid(q, k, v, sizes), masks, strict=True):
            scores = torch.baddbmm(mask, q[:, own], keys.transpose(1, 2), alpha=scale)
            weights.append(torch.softmax(scores, -1, out=scores))
            out[own] = (weights[-1] @ values).transpose(0, 1)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale, ctx.sizes = scale, sizes
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        given = upstream[0].transpose(0, 1)  # [H, T, D]
        to_q, to_k, to_v = (torch.empty_like(x) for x in (q, k, v))
        for (own, keys, values), weight in zip(_laid(q, k, v, ctx.sizes), weights, strict=True):
            slope = given[:, own] @ values.transpose(1, 2)
            torch.ops.aten._softmax_backward_data.out(slope, weight, -1, weight.dtype, grad_input=slope)
            to_q[:, own] = slope @ keys
            _spread(to_k, slope.transpose(1, 2) @ q[:, own], own, ctx.sizes[0])
            _spread(to_v, weight.transpose(1, 2) @ given[:, own], own, ctx.sizes[0])
        return to_q.mul_(ctx.scale), to_k.mul_(ctx.scale), to_v, None, None, None


def _laid(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sizes: Sequence[int]) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Of the virtual tokens and of each chunk: its place, and the keys and values that it looks at, [H, n, D] or [H, P + n, D].

    They are valid until the next is asked for."""
    size, repeats = sizes[0], q.shape[0] // k.shape[0]
    rooms = []
    for x in (k, v):
        room = x.new_empty(x.shape[0], repeats, size + max(sizes[1:]), x.shape[2])
        room[:, :, :size] = x[:, None, :size]
        rooms.append(room)
    keys, values = (room.view(-1, *room.shape[2:]) for room in rooms)
    yield slice(0, size), keys[:, :size], values[:, :size]
    start = size
    for length in sizes[1:]:
        own = slice(start, start + length)
        for room, x in zip(rooms, (k, v), strict=True):
            room[:, :, size : size + length] = x[:, None, own]
        yield own, keys[:, : size + length], values[:, : size + length]
        start += length


def _spread(gradient: torch.Tensor, found: torch.Tensor, own: slice, size: int) -> None:
    """Adds a chunk's gradient of the keys or values that it looks at to that of all. gradient: [G, T, D]; found: [H, P + n, D]."""
    if len(found) > len(gradient):
        found = found.view(len(gradient), -1, *found.shape[1:]).sum(1)
    if own.start:
        gradient[:, :size] += found[:, :size]
        found = found[:, size:]
    gradient[:, own] = found
