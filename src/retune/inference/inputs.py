"""From token ids to what the model reads: the one place that lays out rows for training, evaluation and serving.

Rows are laid end to end, each token at the position that it has in its row after P virtual tokens, so that no pad exists and a row reads
the same alone and in any company. PEFT puts the virtual tokens before the pads of a left-padded row (`[soft][pad][text]`) and counts pads
as positions: such a row differs from the same row alone (peft issues 1093, 1212; tests/unit/inference/test_peft.py shows it).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from retune.errors import BadInputError
from retune.inference.base_model import BaseModel
from retune.inference.encoding import Encoder, Rows, records
from retune.inference.varlen import Sequences, sequences

__all__ = [
    "CHUNK",
    "EncodedRow",
    "LabelTree",
    "Packed",
    "by_tokens",
    "check_length",
    "chunks",
    "encode_with_answers",
    "pack",
    "room",
    "sorted_batches",
]

CHUNK = 128
"""Tokens of neighbouring short rows that share one attention product."""


@dataclass(frozen=True)
class EncodedRow:
    prompt: Sequence[int]
    """Tokens of the rendered template."""
    answer: Sequence[int] = ()
    """Tokens of the answer, its end included; empty at serving."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def read(self) -> Sequence[int]:
        """What a model reads of it: all but the answer's last token, which is predicted and predicts nothing."""
        return [*self.prompt, *self.answer[:-1]]


class LabelTree:
    """Token sequences as a tree: what they begin with in common is read once. Its nodes are their proper beginnings, 1 token or longer."""

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.labels = [list(label) for label in labels]
        nodes: dict[tuple[int, ...], int] = {}
        for label in labels:
            for end in range(1, len(label)):
                nodes.setdefault(tuple(label[:end]), len(nodes))
        self.ids = np.array([path[-1] for path in nodes], dtype=np.int64)
        """Token of each node, [S]."""
        self.depths = np.array([len(path) - 1 for path in nodes], dtype=np.int64)
        """Tokens before it, [S]."""
        sees = [[path[: len(other)] == other for other in nodes] for path in nodes]
        self.sees = np.array(sees, dtype=bool).reshape(len(nodes), len(nodes))
        """[S, S]: whether a node follows another, or is it."""
        steps = [(number, label, end) for number, label in enumerate(labels) for end in range(len(label))]
        self.label = np.array([number for number, _, _ in steps], dtype=np.int64)
        """Label of each of the K tokens of all labels, [K]."""
        self.source = np.array([nodes[tuple(label[:end])] + 1 if end else 0 for _, label, end in steps], dtype=np.int64)
        """What predicts each of them: 0 the row's last token, 1 + n node n, [K]."""
        self.target = np.array([label[end] for _, label, end in steps], dtype=np.int64)
        """The tokens themselves, [K]."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end, the shortest first; T tokens of N rows."""

    ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T], from P."""
    sizes: tuple[int, ...]
    """Tokens of each chunk of whole rows."""
    order: tuple[int, ...]
    """Number of the row at each place, N."""
    ends: torch.Tensor
    """Place of each row's last token before a tree, in the rows' own order, [N]; -1: the row has none, the last virtual token stands in."""
    sources: torch.Tensor
    """Place of the token that predicts each answer token, [K]; -1: the last virtual token."""
    targets: torch.Tensor
    """The answer tokens, [K]."""
    owners: torch.Tensor
    """Number of the row of each answer token, [K]."""
    lengths: tuple[int, ...]
    """Tokens of each row before a tree, in packed order."""
    size: int
    """P."""
    tree: LabelTree | None
    dtype: torch.dtype
    """Of the masks."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.order)

    @cached_property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """Per chunk of n tokens [n, P + n]: 0 where a token may look, -inf elsewhere."""
        more = 0 if self.tree is None else len(self.tree)
        masks = (_mask(self.lengths[chunk], self.tree) for chunk in chunks([length + more for length in self.lengths]))
        before = (np.concatenate([np.zeros((len(mask), self.size), dtype=np.float32), mask], 1) for mask in masks)
        return tuple(torch.from_numpy(mask).to(self.ids.device, self.dtype) for mask in before)

    def sequences(self, with_prefix: bool = False) -> Sequences | None:
        """The same for a kernel that needs no masks, the virtual tokens' own attention too, if asked; None where trees follow the rows."""
        return None if self.tree is not None else sequences(self.lengths, self.size, self.ids.device, with_prefix)


def pack(
    rows: Sequence[EncodedRow],
    size: int,
    device: torch.device | None = None,
    tree: LabelTree | None = None,
    dtype: torch.dtype = torch.float32,
) -> Packed:
    """size: P. tree: continuations that are laid after each row, each node seeing its row and its own beginning. dtype: the model's."""
    tree = tree if tree is not None and len(tree) else None
    texts = [row.read for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(texts[i]))
    more = 0 if tree is None else len(tree)
    lengths = [len(texts[i]) for i in order]
    starts = [0, *accumulate(length + more for length in lengths)]
    ids, positions, sources, targets, owners = [], [], [], [], []
    ends = np.zeros(len(rows), dtype=np.int64)
    for i, start, length in zip(order, starts, lengths, strict=False):
        row = rows[i]
        ids.append(np.array(texts[i], dtype=np.int64))
        positions.append(np.arange(size, size + length))
        ends[i] = start + length - 1 if length else -1
        first = start + len(row.prompt) - 1 if row.prompt else -1
        sources.append(np.array([first, *range(start + len(row.prompt), start + length)][: len(row.answer)], dtype=np.int64))
        targets.append(np.array(row.answer, dtype=np.int64))
        owners.append(np.full(len(row.answer), i, dtype=np.int64))
        if tree is not None:
            ids.append(tree.ids)
            positions.append(size + length + tree.depths)
    laid = [length + more for length in lengths]
    return Packed(
        _tensor(ids, device),
        _tensor(positions, device),
        tuple(sum(laid[chunk]) for chunk in chunks(laid)),
        tuple(order),
        _tensor([ends], device),
        _tensor(sources, device),
        _tensor(targets, device),
        _tensor(owners, device),
        tuple(lengths),
        size,
        tree,
        dtype,
    )


def room(base: BaseModel, soft: int, answer: int) -> int:
    """Tokens that a rendered template may have. soft: P. answer: tokens of the answer, which an encoder-decoder writes elsewhere."""
    return base.context - soft - (answer if base.family == "decoder" else 0)


def check_length(number: int, row: EncodedRow, soft: int, new: int, base: BaseModel) -> None:
    """soft: P. new: tokens still to be generated or scored after the row.

    Raises BadInputError if the row needs more positions than the model has, or has nothing to read.
    """
    left = room(base, soft, len(row.answer) + new)
    if len(row.prompt) > left:
        answer = base.context - soft - left
        raise BadInputError(
            f"row {number}: prompt too long: {soft} virtual + {len(row.prompt)} prompt + {answer} answer tokens = "
            f"{soft + len(row.prompt) + answer}, "
            f"but the model reads {base.context}; lower preprocess.max_tokens, tune.num_virtual_tokens or generation.max_new_tokens"
        )
    if soft + len(row.prompt) == 0:
        raise BadInputError(f"row {number}: the rendered template is empty; a template without soft prompt must give at least one token")
    if base.family == "encoder" and not row.prompt:
        raise BadInputError(f"row {number}: the rendered template is empty; an encoder must read at least one token of it")


def encode_with_answers(base: BaseModel, encoder: Encoder, soft: int, rows: Rows) -> tuple[list[EncodedRow], list[int]]:
    """Rows with each of their references and the end of the sequence, as training and reference losses read them. Of an encoder the answer
    is the number of the label.

    soft: P. Returns (one encoded row per reference, number of the row that it belongs to). Raises BadInputError for a row that is too
    long or has no usable target.
    """
    end = [] if base.eos_id is None or base.family == "encoder" else [base.eos_id]
    table = records(rows)
    references = encoder.answers(table)
    left = [room(base, soft, max(map(len, answers)) + len(end)) for answers in references]
    encoded, owners = [], []
    for number, (prompt, answers) in enumerate(zip(encoder.prompts(table, left), references, strict=True)):
        encoded += [EncodedRow(prompt, [*answer, *end]) for answer in answers]
        owners += [number] * len(answers)
    for number, row in zip(owners, encoded, strict=True):
        check_length(number, row, soft, 0, base)
        if not row.answer:
            raise BadInputError(f"row {number}: the answer has no tokens, and the tokenizer has no end of sequence to write after it")
    return encoded, owners


def sorted_batches(rows: Sequence[EncodedRow], tokens: int, extra: int = 0) -> list[list[int]]:
    """Numbers of the rows in batches of at most `tokens` tokens, `extra` for each row included; a longer row is a batch of its own.

    The order is that of length, then content: the same rows make the same batches, in whatever order they come.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), tuple(rows[i].prompt), tuple(rows[i].answer)))
    return by_tokens(order, [len(rows[i]) + extra for i in order], tokens)


def by_tokens(items: Iterable[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Neighbouring items in batches of at most `tokens` tokens; a longer item is a batch of its own."""
    batches: list[list[int]] = []
    filled = 0
    for item, length in zip(items, lengths, strict=True):
        if not batches or filled + length > tokens:
            batches.append([])
            filled = 0
        batches[-1].append(item)
        filled += length
    return batches


def chunks(lengths: Sequence[int]) -> list[slice]:
    """Rows that share an attention product."""
    batches = by_tokens(range(len(lengths)), lengths, CHUNK)
    return [slice(batch[0], batch[-1] + 1) for batch in batches]


def _mask(lengths: Sequence[int], tree: LabelTree | None) -> np.ndarray:
    """[n, n] for rows of these lengths, each followed by the tree."""
    more = 0 if tree is None else len(tree)
    width = sum(lengths) + more * len(lengths)
    row = np.repeat(np.arange(len(lengths)), [length + more for length in lengths])
    sees = np.tril(row[:, None] == row[None, :])
    if tree is not None:
        start = 0
        for length in lengths:
            nodes = slice(start + length, start + length + more)
            sees[nodes, nodes] = tree.sees
            start += length + more
    mask = np.zeros((width, width), dtype=np.float32)
    mask[~sees] = -np.inf
    return mask


def _tensor(parts: Sequence[np.ndarray], device: torch.device | None) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)).to(device)
