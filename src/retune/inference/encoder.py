"""The arithmetic of an encoder with a classification head (BERT-type): losses and log-probabilities of labels.

Rows are packed as in `decoder`, but attention looks both ways: the virtual tokens see the row, so that each row has its own copy of them.
The head reads the mean of the row's last hidden states, virtual tokens apart (as sentence-transformers pools, arXiv:1908.10084). It
starts at 0: the template alone gives every label the same share.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from retune.errors import BadInputError
from retune.inference.attention import PackedRows, Prefix
from retune.inference.base_model import BaseModel
from retune.inference.decoder import run_pass
from retune.inference.inputs import EncodedRow, LabelTree, chunks
from retune.inference.varlen import Sequences, sequences

__all__ = ["Whole", "answer_losses", "generate_steps", "lay", "means", "run_prefix", "score_batch"]


@dataclass(frozen=True)
class Whole:
    """Rows with their virtual tokens laid end to end, the shortest first; T tokens, virtual ones included, of N rows."""

    ids: torch.Tensor
    """Of the rows' own tokens, [T - N * P]; with keys and values in place of virtual tokens [T]."""
    places: torch.Tensor
    """Where each of the T tokens comes from: virtual token n is n, own token n is P + n, [T]."""
    own: torch.Tensor
    """Places in T of the rows' own tokens, in the order of `ids`."""
    positions: torch.Tensor
    """[T]"""
    sizes: tuple[int, ...]
    """Tokens of each chunk of whole rows."""
    lengths: tuple[int, ...]
    """Tokens of each row, its virtual ones included; the shortest first."""
    before: int
    """P': keys and values before each row."""
    dtype: torch.dtype
    """Of the masks."""
    rows: torch.Tensor
    """Number of the row of each own token, in the order of `ids`."""
    targets: torch.Tensor
    """Number of each row's label, [N]; empty at serving."""
    owners: torch.Tensor
    """Number of the row of each target, [N]."""
    count: int
    """N."""

    @cached_property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """Per chunk of n tokens [n, P' + n]: 0 within a row, -inf elsewhere."""
        masks = []
        for chunk in chunks(self.lengths):
            of_row = np.repeat(np.arange(chunk.stop - chunk.start), self.lengths[chunk])
            mask = np.where(of_row[:, None] == of_row[None, :], 0, -np.inf).astype(np.float32)
            mask = np.concatenate([np.zeros((len(mask), self.before), dtype=np.float32), mask], 1)
            masks.append(torch.from_numpy(mask).to(self.ids.device, self.dtype))
        return tuple(masks)

    def sequences(self, with_prefix: bool = False) -> Sequences:
        """The same for a kernel that needs no masks."""
        return sequences(self.lengths, self.before, self.ids.device, with_prefix, causal=False)


def run_prefix(base: BaseModel, soft_prompt: torch.Tensor) -> Prefix:  # noqa: ARG001 - nothing of it can be computed before the rows
    """The soft prompt [P, H] as it is."""
    return Prefix(vectors=soft_prompt)


def lay(base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow]) -> Whole:
    """The rows after what stands before each. An answer is the number of a label."""
    vectors = 0 if prefix is None or prefix.vectors is None else prefix.size
    before = 0 if prefix is None or prefix.vectors is not None else prefix.size
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    lengths = [len(rows[i].prompt) for i in order]
    starts = [0, *accumulate(lengths)]  # in `ids`
    places = [np.r_[:vectors, vectors + start : vectors + start + length] for start, length in zip(starts, lengths, strict=False)]
    whole = tuple(vectors + length for length in lengths)
    from_all = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    first = base.first_position + before
    positions = [np.arange(first, first + vectors + length) for length in lengths]
    answered = [i for i, row in enumerate(rows) if row.answer]

    def tensor(values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(base.device)

    return Whole(
        ids=tensor([token for i in order for token in rows[i].prompt]),
        places=tensor(from_all),
        own=tensor(np.flatnonzero(from_all >= vectors)),
        positions=tensor(np.concatenate(positions) if positions else []),
        sizes=tuple(sum(whole[chunk]) for chunk in chunks(whole)),
        lengths=whole,
        before=before,
        dtype=base.dtype,
        rows=tensor(np.repeat(order, lengths) if order else []),
        targets=tensor([rows[i].answer[0] for i in answered]),
        owners=tensor(answered),
        count=len(rows),
    )


def means(base: BaseModel, prefix: Prefix | None, laid: Whole) -> torch.Tensor:
    """Mean of each row's last hidden states, [N, H], fp32; gradients flow into the prefix and into weights that are tuned."""
    vectors = base.embed(laid.ids)
    if prefix is not None and prefix.vectors is not None:
        vectors = torch.cat([prefix.vectors.to(vectors.dtype), vectors])
    keys = None if prefix is None or prefix.vectors is not None else prefix
    hidden = run_pass(base, vectors.index_select(0, laid.places), laid.positions, PackedRows(keys, laid))
    own = hidden.index_select(0, laid.own).to(torch.promote_types(hidden.dtype, torch.float32))
    sums = own.new_zeros(laid.count, own.shape[1]).index_add(0, laid.rows, own)
    return sums / torch.bincount(laid.rows, minlength=laid.count)[:, None]


def answer_losses(base: BaseModel, prefix: Prefix | None, laid: Whole) -> torch.Tensor:
    """Cross entropy of each row's label in nats, [N], fp32."""
    return F.cross_entropy(_logits(base, means(base, prefix, laid)).index_select(0, laid.owners), laid.targets, reduction="none")


@torch.no_grad()
def score_batch(base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow], tree: LabelTree) -> torch.Tensor:  # noqa: ARG001
    """Log-probability of each label: [N, C], fp32. tree: the labels, which the head knows by number."""
    return _logits(base, means(base, prefix, lay(base, prefix, rows))).log_softmax(1)


def generate_steps(*_: Any, **__: Any) -> Iterator[list[int | None]]:
    """Raises BadInputError: an encoder writes nothing."""
    raise BadInputError("an encoder writes no text; only task: classification runs on it")


def _logits(base: BaseModel, states: torch.Tensor) -> torch.Tensor:
    """states: [N, H] -> [N, C]."""
    assert base.head is not None  # noqa: S101 - `tuned_model` gives an encoder its head
    weight, bias = base.head
    return F.linear(states, weight.to(states.dtype), bias.to(states.dtype))
