"""What a soft prompt learned, one virtual token at a time: the words nearest to it, what it is worth, and who looks at it.

Letters: P virtual tokens, H hidden size, V vocabulary, T packed tokens, K answer tokens; in attention, H query heads, G key-value heads,
D their size.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from retune.errors import BadInputError
from retune.inference.attention import PackedRows, Prefix
from retune.inference.base_model import BaseModel
from retune.inference.decoder import run_pass, run_prefix
from retune.inference.encoding import Encoder, Rows
from retune.inference.inputs import EncodedRow, Packed, encode_with_answers, pack, sorted_batches
from retune.prompt_tuning.trainer import VALIDATION_TOKENS, validation_loss
from retune.tuned import Tuned
from retune.workspace import Workspaces

__all__ = [
    "Explanation",
    "Neighbour",
    "RecordedRows",
    "VirtualToken",
    "attention_masses",
    "explain",
    "nearest_tokens",
    "token_text",
    "validation_rows",
]

NEAREST = 5
"""Vocabulary tokens named for each virtual token."""
VOCABULARY = 2**14
"""Vocabulary tokens that are compared at a time."""
SEED = 0
"""Draws the same validation rows every time."""


@dataclass(frozen=True)
class Neighbour:
    """A vocabulary token near a virtual token."""

    id: int
    text: str
    cosine: float
    distance: float
    """Euclidean."""


@dataclass(frozen=True)
class VirtualToken:
    number: int
    """Place in the soft prompt, from 1."""
    effect: float
    """Validation loss without it minus the loss with all, nats per answer token: above 0, it is of use."""
    attention: float
    """Share of their attention that the tokens which predict the answers pay to it: mean over layers, heads and answer tokens."""
    by_cosine: list[Neighbour]
    """The nearest vocabulary tokens, nearest first."""
    by_distance: list[Neighbour]


@dataclass(frozen=True)
class Explanation:
    prompt: str
    release: str
    rows: int
    """Validation rows that were read."""
    answer_tokens: int
    """Tokens of all their references, ends included."""
    loss: float
    """With the whole soft prompt, nats per answer token."""
    template_loss: float
    """Without any of it."""
    text_attention: float
    """Share of the attention that stays with the text; the virtual tokens have the rest."""
    even_attention: float
    """What one token would get if all were attended to alike."""
    tokens: list[VirtualToken]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def validation_rows(workspaces: Workspaces, tuned: Tuned, rows: int) -> tuple[pd.DataFrame, int]:
    """The validation rows that a release was tuned with, at most `rows` of them, drawn over the whole split; and how many there are."""
    place = f"artifacts/{tuned.recorded.prompt}/dataset/validation.parquet"
    frame = pd.read_parquet(io.BytesIO(workspaces.read(tuned.recorded.lineage, place)))
    drawn = frame if len(frame) <= rows else frame.sample(rows, random_state=SEED).sort_index()
    return drawn.reset_index(drop=True), len(frame)


def explain(tuned: Tuned, rows: Rows) -> Explanation:
    """Explains each virtual token on validation rows: P + 2 passes over them.

    Raises BadInputError without rows, or for one that cannot be used.
    """
    if not len(rows):
        raise BadInputError(f"{tuned.recorded.prompt}: the validation split of its release is empty: nothing can be measured")
    base, soft_prompt = tuned.predictor.base, tuned.soft_prompt
    size = len(soft_prompt)
    encoder = Encoder(tuned.predictor.prompt, base.tokenizer)
    encoded, _ = encode_with_answers(base, encoder, size, rows)
    for number, row in enumerate(encoded):
        if not row.prompt:
            raise BadInputError(f"row {number}: the rendered template has no tokens: nothing would be left without the soft prompt")
    batches = {tokens: _batches(base, encoded, tokens) for tokens in {size, size - 1, 0}}
    loss = _loss(base, soft_prompt, batches[size])
    template_loss = _loss(base, None, batches[0])
    without = [_without(soft_prompt, number) for number in range(size)]
    effects = [(template_loss if rest is None else _loss(base, rest, batches[size - 1])) - loss for rest in without]
    masses, even = attention_masses(base, soft_prompt, batches[size])
    by_cosine, by_distance = nearest_tokens(base, soft_prompt)
    return Explanation(
        prompt=tuned.recorded.prompt,
        release=tuned.recorded.release,
        rows=len(rows),
        answer_tokens=sum(len(row.answer) for row in encoded),
        loss=loss,
        template_loss=template_loss,
        text_attention=float(masses[size]),
        even_attention=even,
        tokens=[VirtualToken(n + 1, effects[n], float(masses[n]), by_cosine[n], by_distance[n]) for n in range(size)],
    )


def _batches(base: BaseModel, rows: Sequence[EncodedRow], size: int) -> list[Packed]:
    """The rows laid out after P = `size` virtual tokens."""
    return [pack([rows[i] for i in numbers], size, base.device, dtype=base.dtype) for numbers in sorted_batches(rows, VALIDATION_TOKENS)]


def _loss(base: BaseModel, soft_prompt: torch.Tensor | None, batches: Sequence[Packed]) -> float:
    """Mean over all answer tokens, nats."""
    return validation_loss(base, lambda: None if soft_prompt is None else run_prefix(base, soft_prompt), batches)


def _without(soft_prompt: torch.Tensor, number: int) -> torch.Tensor | None:
    """The soft prompt less one virtual token, [P - 1, H]; None if none is left."""
    rest = torch.cat([soft_prompt[:number], soft_prompt[number + 1 :]])
    return rest if len(rest) else None


@dataclass
class RecordedRows:
    """A `PackedRows` run after a prefix that also keeps what the tokens that predict an answer attend to."""

    rows: PackedRows
    prefix: Prefix
    batch: Packed
    masses: list[torch.Tensor] = field(default_factory=list)
    """Per layer [P + 1], fp64: mean over the heads, sum over the K tokens, for each virtual token and for all of the text."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        prefix = self.prefix.keys[layer]  # [G, P, D]
        groups, size, _ = prefix.shape
        total = q.new_zeros(size + 1, dtype=torch.float64)
        sources = self.batch.sources
        for end, tokens, mask in zip(accumulate(self.batch.sizes), self.batch.sizes, self.batch.masks, strict=True):
            start = end - tokens
            places = sources[(sources >= start) & (sources < end)]
            keys = torch.cat([prefix, k[:, start:end]], 1)  # [G, P + n, D]
            queries = (q[:, places] * scale).reshape(groups, -1, q.shape[-1])  # [G, H/G * k, D]
            hidden = mask[places - start].repeat(queries.shape[1] // max(1, len(places)), 1)  # [H/G * k, P + n]
            weights = (queries @ keys.transpose(1, 2) + hidden).double().softmax(-1).sum((0, 1))  # [P + n]
            total += torch.cat([weights[:size], weights[size:].sum(0, keepdim=True)])
        self.masses.append(total / q.shape[0])
        return self.rows.attend(layer, q, k, v, scale)


@torch.no_grad()
def attention_masses(base: BaseModel, soft_prompt: torch.Tensor, batches: Sequence[Packed]) -> tuple[torch.Tensor, float]:
    """Attention of the tokens that predict the answers, mean over layers, heads and answer tokens.

    batches: laid out after P virtual tokens; no row without a prompt. Returns (mass of each virtual token and, last, of the text, [P + 1]:
    they add up to 1; what one token would get if all were attended to alike).
    """
    prefix = run_prefix(base, soft_prompt)
    assert prefix is not None  # noqa: S101 - there is a soft prompt
    total = torch.zeros(len(soft_prompt) + 1, dtype=torch.float64)
    even, count = 0.0, 0
    for batch in batches:
        run = RecordedRows(PackedRows(prefix, batch), prefix, batch)
        run_pass(base, base.embed(batch.ids), batch.positions, run)
        total += torch.stack([mass.cpu() for mass in run.masses]).mean(0)
        even += float((1 / (batch.positions[batch.sources] + 1).double()).sum())
        count += len(batch.sources)
    return total / count, even / count


@torch.no_grad()
def nearest_tokens(base: BaseModel, soft_prompt: torch.Tensor, count: int = NEAREST) -> tuple[list[list[Neighbour]], list[list[Neighbour]]]:
    """The vocabulary tokens nearest to each virtual token, the nearest first: (by cosine, by euclidean distance), P lists each.

    Compared are the vectors that the model reads, for the tokens that the tokenizer knows.
    """
    rows = base.model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor(sorted({i for i in base.tokenizer.get_vocab().values() if i < rows}), device=base.device)
    vectors = soft_prompt.double()
    by_cosine, by_distance = [], []
    for part in torch.split(ids, VOCABULARY):
        table = base.embed(part).double()  # [v, H]
        cosine = F.normalize(vectors) @ F.normalize(table).T  # [P, v]
        distance = torch.cdist(vectors, table)
        figures = torch.stack([part.expand_as(cosine).double(), cosine, distance], -1)
        by_cosine.append(_first(figures, -cosine, count))
        by_distance.append(_first(figures, distance, count))
    of_cosine, of_distance = torch.cat(by_cosine, 1), torch.cat(by_distance, 1)
    return (
        _neighbours(base.tokenizer, _first(of_cosine, -of_cosine[..., 1], count)),
        _neighbours(base.tokenizer, _first(of_distance, of_distance[..., 2], count)),
    )


def _first(figures: torch.Tensor, key: torch.Tensor, count: int) -> torch.Tensor:
    """figures: [P, v, 3]; key: [P, v]. Returns those with the least keys, in order, [P, count, 3]."""
    order = key.argsort(stable=True, dim=1)[:, :count, None]
    return figures.gather(1, order.expand(-1, -1, figures.shape[2]))


def _neighbours(tokenizer: Any, figures: torch.Tensor) -> list[list[Neighbour]]:
    """figures: id, cosine, distance, [P, c, 3]."""
    return [[Neighbour(int(i), token_text(tokenizer, int(i)), cosine, distance) for i, cosine, distance in row] for row in figures.tolist()]


def token_text(tokenizer: Any, number: int) -> str:
    """A token as it reads in a text, its leading space included; one that is no text by itself (a byte) as the tokenizer writes it."""
    piece: str = tokenizer.convert_ids_to_tokens(number)
    text: str = tokenizer.decode([number], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return piece
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text  # sentence-piece's sign for a space
