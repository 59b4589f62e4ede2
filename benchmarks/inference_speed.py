"""Scoring of labels, generation and reuse of the prefix: PEFT's model against Retune's, the same weights, prompts and threads."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from models import collate, random_base, random_model, random_rows, start_prompt, with_peft
from rows import Row, interleaved, of_rounds, ratios, say

from retune.inference.base_model import BaseModel
from retune.inference.decoder import run_prefix, score_batch
from retune.inference.families import generate_batch
from retune.inference.inputs import EncodedRow, LabelTree

__all__ = ["measure"]

SIZE = "5M"
NEW = 16
"""Tokens written after each prompt."""


def measure(quick: bool) -> list[Row]:
    vocab, rounds = (4_000, 1) if quick else (32_000, 3)
    base, model = random_base(SIZE, vocab), random_model(SIZE, vocab)
    return [
        *_scoring(base, model, *((5, 2) if quick else (77, 4)), rounds),
        *_generation(base, model, 4 if quick else 64, rounds),
        *_reuse(base, rounds + 2),
    ]


def _scoring(base: BaseModel, model: Any, count: int, prompts: int, rounds: int) -> list[Row]:
    soft = 20
    shown = f"{SIZE}, vocabulary {base.vocabulary // 1000}k, P={soft}, {prompts} rows, {count} labels"
    say(f"labels: {shown}")
    rows, labels = _prompts(prompts, base.vocabulary), _labels(count, base.vocabulary)
    start = start_prompt(SIZE, soft)
    tuned, tree = with_peft(model, start).eval(), LabelTree(labels)
    with torch.no_grad():
        prefix = run_prefix(base, start)
    _peft_scores(tuned, rows, labels[:1])
    scores: dict[str, torch.Tensor] = {}

    def ours() -> None:
        scores["retune"] = score_batch(base, prefix, rows, tree)

    def theirs() -> None:
        scores["peft"] = _peft_scores(tuned, rows, labels)

    ours()
    seconds = interleaved({"retune": ours, "peft": theirs}, rounds, warm_up=False)
    apart = float((scores["peft"] - scores["retune"]).abs().max())
    return [
        ratios("label scores", f"{shown}: one PEFT forward per label / Retune", seconds["peft"], seconds["retune"]),
        of_rounds("label scores", f"{shown}: largest difference of a log-probability", [apart], "nats"),
    ]


def _generation(base: BaseModel, model: Any, prompts: int, rounds: int) -> list[Row]:
    soft = 100
    shown = f"{SIZE}, vocabulary {base.vocabulary // 1000}k, P={soft}, {prompts} prompts, {NEW} tokens each"
    say(f"generation: {shown}")
    rows, start = _prompts(prompts, base.vocabulary), start_prompt(SIZE, soft)
    tuned = with_peft(model, start).eval()
    with torch.no_grad():
        prefix = run_prefix(base, start)
    tokens: dict[str, list[list[int]]] = {}

    def ours() -> None:
        tokens["retune"] = generate_batch(base, prefix, rows, NEW)

    def theirs() -> None:
        tokens["peft"] = _peft_tokens(tuned, rows)

    alone = [_peft_tokens(tuned, [row])[0] for row in rows]
    seconds = interleaved({"retune": ours, "peft": theirs}, rounds)
    equal = "tokens as PEFT writes them prompt by prompt"
    return [
        ratios("generation", f"{shown}: PEFT's generate / Retune, one batch", seconds["peft"], seconds["retune"]),
        of_rounds("generation", f"{shown}: {equal}, Retune's batch", [_equal(tokens["retune"], alone)], "%"),
        of_rounds("generation", f"{shown}: {equal}, PEFT's left-padded batch", [_equal(tokens["peft"], alone)], "%"),
    ]


def _reuse(base: BaseModel, rounds: int) -> list[Row]:
    soft = 100
    start, tree = start_prompt(SIZE, soft), LabelTree([[5], [6], [7]])
    with torch.no_grad():
        prefix = run_prefix(base, start)
    found = []
    for prompts in (1, 16):
        rows = _prompts(prompts, base.vocabulary)

        @torch.no_grad()
        def anew(rows: Sequence[EncodedRow] = rows) -> None:
            score_batch(base, run_prefix(base, start), rows, tree)

        def reused(rows: Sequence[EncodedRow] = rows) -> None:
            score_batch(base, prefix, rows, tree)

        seconds = interleaved({"anew": anew, "reused": reused}, rounds)
        shown = f"{SIZE}, vocabulary {base.vocabulary // 1000}k, P={soft}, {prompts} rows, 3 labels of a token"
        found.append(ratios("prefix reuse", f"{shown}: prefix computed anew / reused", seconds["anew"], seconds["reused"]))
    return found


def _prompts(count: int, vocab: int) -> list[EncodedRow]:
    return [EncodedRow(row.prompt) for row in random_rows(count, vocab, 3)]


def _labels(count: int, vocab: int) -> list[list[int]]:
    """1 to 4 tokens, pairs of labels begin alike; none begins another."""
    rng, labels = random.Random(0), []
    while len(labels) < count:
        first = rng.randrange(1, vocab)
        more = [[rng.randrange(1, vocab) for _ in range(rng.randint(1, 3))] for _ in range(2)]
        pair = [[first, *tail] for tail in more] if rng.random() < 0.7 else [[first]]
        labels += pair
    return labels[:count]


@torch.no_grad()
def _peft_scores(tuned: Any, rows: Sequence[EncodedRow], labels: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probability of each label after each row, [N, C]: a forward pass per label, the softmax at the label's positions only."""
    soft = tuned.active_peft_config.num_virtual_tokens
    scores = torch.zeros(len(rows), len(labels))
    for number, label in enumerate(labels):
        batch = collate([EncodedRow(row.prompt, label) for row in rows])
        logits = tuned(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for i, row in enumerate(rows):
            at = soft + len(row.prompt) - 1
            found = logits[i, at : at + len(label)].log_softmax(-1)
            scores[i, number] = found.gather(1, torch.tensor(label)[:, None]).sum()
    return scores


@torch.no_grad()
def _peft_tokens(tuned: Any, rows: Sequence[EncodedRow]) -> list[list[int]]:
    """The likeliest tokens, NEW per row; rows of different length are padded on the left, as PEFT wants them."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row.prompt), 1
    written = tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    tokens: list[list[int]] = written[:, -NEW:].tolist()
    return tokens


def _equal(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Percent of the tokens that are the same at the same place."""
    pairs = [a == b for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True)]
    return 100 * sum(pairs) / len(pairs)
