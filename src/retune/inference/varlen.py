"""Attention of a GPU in bf16: torch's kernel for sequences of many lengths (FlashAttention-2, arXiv:2307.08691), which needs no mask.

Before its first use it is held against plain attention on the machine at hand, forwards and backwards; where it is missing or gives
something else, attention under masks serves on and the log says why.

Letters: H query heads, G key-value heads, D their size, T tokens that ask, S tokens that are seen, P virtual tokens, N sequences.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

__all__ = ["Sequences", "has_kernel", "sequences"]

logger = logging.getLogger(__name__)

TOLERANCE = 0.03
"""Of the largest value: what bf16's 8 bits of a product, its sum and its softmax may differ by. A wrong mask differs by far more."""


@dataclass(frozen=True)
class Sequences:
    """Which tokens ask and which are seen by them, sequence by sequence."""

    queries: torch.Tensor
    """Where each sequence's queries begin, and the end of the last, [N + 1], int32."""
    keys: torch.Tensor
    """The same of what they see, [N + 1], int32."""
    longest: tuple[int, int]
    """Most queries and most keys of a sequence."""
    size: int
    """P: the first keys, which every sequence sees before its own."""
    places: torch.Tensor
    """Where each of `keys` is found in N copies of the virtual tokens and, behind them, all other tokens."""
    causal: bool
    """A sequence's last query sees all of its keys, the one before it all but the last, and so on; False: each sees all."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q: [H, T, D]; k, v: [G, S, D]. Returns [T, H, D]."""
        queries, keys = self.queries.to(q.device), self.keys.to(q.device)  # a sharded model has several devices
        window, grouped = (-1, 0) if self.causal else (-1, -1), q.shape[0] != k.shape[0]
        q, k, v = (x.transpose(0, 1) for x in (q, self.seen(k), self.seen(v)))
        out = varlen_attn(q, k, v, queries, keys, *self.longest, scale=scale, window_size=window, enable_gqa=grouped)
        assert isinstance(out, torch.Tensor)  # noqa: S101 - nothing besides is asked for
        return out

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [G, S, D] in the order of `keys`. Gradients of a virtual token's copies are added up at once, not by atomics."""
        if not self.size:
            return x
        copies = x[:, None, : self.size].expand(-1, len(self.keys) - 1, -1, -1).flatten(1, 2)
        return torch.cat([copies, x[:, self.size :]], 1).index_select(1, self.places.to(x.device))


def sequences(lengths: Sequence[int], size: int, device: torch.device, with_prefix: bool = False, causal: bool = True) -> Sequences:
    """Rows laid end to end that each follow P virtual tokens, whose keys stand before all others.

    lengths: tokens of each row. size: P. device: where the places are kept. with_prefix: the virtual tokens ask too, before the rows, and
    see themselves.
    """
    rows = [length for length in lengths if length]
    asked = [size, *rows] if with_prefix and size else rows
    own = [0, *rows] if with_prefix and size else rows  # keys of a sequence beside those of the virtual tokens
    begin = size * len(own)
    places = [
        np.r_[size * n : size * (n + 1), begin + end - length : begin + end]
        for n, (end, length) in enumerate(zip(accumulate(own), own, strict=True))
    ]
    queries, keys = (torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in (asked, map(len, places)))
    longest = (max(asked), size + max(own))
    return Sequences(queries, keys, longest, size, torch.from_numpy(np.concatenate(places)).to(device), causal)


def has_kernel(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the kernel serves. q: [H, T, D]; k: [G, S, D]."""
    return q.is_cuda and q.dtype == torch.bfloat16 and _is_right(q.device, q.shape[0], k.shape[0], q.shape[2])


@cache
def _is_right(device: torch.device, heads: int, groups: int, size: int) -> bool:
    """Whether outputs and gradients are those of plain attention in fp32, for rows of a few lengths behind virtual tokens."""
    drawn = torch.Generator().manual_seed(0)
    lengths, virtual, scale = (*[5] * 64, 1, 17, 130), 20, 1.5 * size**-0.5
    total = virtual + sum(lengths)
    q, k, v, upstream = (torch.randn(n, total, size, generator=drawn).to(device, torch.bfloat16) for n in (heads, groups, groups, heads))
    for causal in (True, False):
        laid = sequences(lengths, virtual, device, with_prefix=True, causal=causal)
        wanted = _with_gradients(partial(_plain, laid, scale), *(x.float() for x in (q, k, v, upstream)))
        try:
            found = _with_gradients(partial(laid.attend, scale=scale), q, k, v, upstream)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            logger.warning("no attention kernel for sequences of many lengths on %s, masks serve in its place: %s", device, error)
            return False
        near = [bool((one - other).abs().max() <= TOLERANCE * other.abs().max()) for one, other in zip(found, wanted, strict=True)]
        if not all(near):  # NaN is near nothing
            logger.warning("the attention kernel for sequences of many lengths is wrong on %s, masks serve in its place", device)
            return False
    return True


def _plain(laid: Sequences, scale: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same as `Sequences.attend`, one sequence after the other."""
    out, k, v = [], laid.seen(k), laid.seen(v)
    for first, last, begin, end in zip(laid.queries, laid.queries[1:], laid.keys, laid.keys[1:], strict=False):
        keys, values = (x[:, begin:end].repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = q[:, first:last] @ keys.transpose(1, 2) * scale  # [H, n, m]
        if laid.causal:
            n, m = scores.shape[1:]
            scores = scores.masked_fill(torch.ones(n, m, device=q.device).triu(m - n + 1).bool(), float("-inf"))
        out.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


@torch.enable_grad()
def _with_gradients(attend: Callable[..., torch.Tensor], *given: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values, fp32. given: those three, and the gradient of the output [H, T, D]."""
    *inputs, upstream = given
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [x.detach().float() for x in (out, *torch.autograd.grad(out, leaves, upstream.transpose(0, 1)))]
