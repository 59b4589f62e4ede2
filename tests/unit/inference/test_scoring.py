"""Padded equals unpadded, a batch equals its rows alone, the cache changes nothing, and transformers agrees."""

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import GenerationConfig

from retune.inference.base_model import ARCHITECTURES
from retune.inference.inputs import EncodedRow, assemble, collate
from retune.inference.scoring import answer_losses, generate_batch, logits_at, prefill, row_losses, score_batch

PROMPTS = [[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [30], [31, 32, 33, 34], [10, 11, 12, 13]]
ROWS = [EncodedRow(p) for p in PROMPTS]
ANSWERED = [EncodedRow(p, [60 + i] * (i + 1)) for i, p in enumerate(PROMPTS)]
SINGLE, SEVERAL = [[40], [41], [42]], [[40], [41, 42], [41, 43, 44, 45], [46, 47]]
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def whole_logits(base, soft, ids):
    """One unpadded row through the model's own forward, without a cache: [P+T, V]."""
    parts = [base.embed(torch.tensor(ids))] if soft is None else [soft, base.embed(torch.tensor(ids))]
    with torch.no_grad():
        return base.model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]


def log_probability(base, soft, prompt, answer):
    at = len(prompt) + (0 if soft is None else len(soft))
    logs = whole_logits(base, soft, prompt + answer).log_softmax(-1)
    return sum(logs[at - 1 + i, token] for i, token in enumerate(answer))


@pytest.fixture(params=[None, 1, 6], ids=lambda p: f"P={p or 0}")
def soft(request, base):
    return None if request.param is None else tiny.make_soft_prompt(base, request.param)


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL], ids=["one token", "several tokens"])
def test_scores_are_those_of_each_row_and_label_alone_and_unpadded(base, soft, labels):
    expected = torch.tensor([[log_probability(base, soft, p, label) for label in labels] for p in PROMPTS])
    torch.testing.assert_close(score_batch(base, soft, ROWS, labels), expected, **TOLERANCE)


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL], ids=["one token", "several tokens"])
def test_a_batchs_scores_are_those_of_its_rows_alone(base, soft, labels):
    alone = torch.cat([score_batch(base, soft, [row], labels) for row in ROWS])
    torch.testing.assert_close(score_batch(base, soft, ROWS, labels), alone, **TOLERANCE)


def test_losses_are_those_of_each_row_alone_and_unpadded(base, soft):
    expected = [-log_probability(base, soft, row.prompt, list(row.answer)).item() for row in ANSWERED]
    assert row_losses(base, soft, collate(ANSWERED, "right")) == pytest.approx(expected, abs=1e-4)


def test_left_and_right_padding_give_the_same_next_token(base, soft):
    left, _ = prefill(base, assemble(base, soft, collate(ROWS, "left")))
    alone = torch.cat([whole_logits(base, soft, p)[-1:] for p in PROMPTS])
    torch.testing.assert_close(logits_at(base, left), alone, **TOLERANCE)


def test_generated_tokens_are_those_of_a_row_alone_without_a_cache(base, soft):
    """Each token is recomputed from the whole row."""
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + 10 and (token := whole_logits(base, soft, ids)[-1].argmax().item()) not in base.stop_ids:
            ids.append(token)
        expected.append(ids[len(prompt) :])
    assert generate_batch(base, soft, ROWS, 10) == expected
    assert [generate_batch(base, soft, [row], 10)[0] for row in ROWS] == expected


def test_generated_tokens_are_those_of_transformers(base, soft):
    inputs = assemble(base, soft, collate(ROWS, "left"))
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = base.model.generate(inputs_embeds=inputs.embeddings, attention_mask=inputs.mask, generation_config=config)
    mute = replace(base, tokenizer=_NoEnd())
    mute.model.generation_config, before = GenerationConfig(), mute.model.generation_config
    try:
        assert generate_batch(mute, soft, ROWS, 10) == theirs.tolist()
    finally:
        mute.model.generation_config = before


class _NoEnd:
    eos_token_id = None


def test_generation_ends_at_a_stop_token_in_each_row_by_itself(llama):
    soft = tiny.make_soft_prompt(llama)
    free = generate_batch(llama, soft, ROWS, 10)
    stop = free[0][3]

    class Ending:
        eos_token_id = stop

    ended = generate_batch(replace(llama, tokenizer=Ending()), soft, ROWS, 10)
    assert ended == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(ended[0]) <= 3


def test_drawn_tokens_depend_on_the_row_alone(llama):
    soft = tiny.make_soft_prompt(llama)
    drawn = generate_batch(llama, soft, ROWS, 8, temperature=0.7)
    assert drawn == generate_batch(llama, soft, ROWS, 8, temperature=0.7)
    assert drawn == [generate_batch(llama, soft, [row], 8, temperature=0.7)[0] for row in ROWS]
    assert drawn != generate_batch(llama, soft, ROWS, 8)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_an_allowed_architecture_has_plain_logits_and_follows_positions(kind):
    """The head is the output embedding alone, inputs_embeds equal input_ids, and left pads change nothing."""
    base = tiny.make_base(kind)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = base.model(input_ids=ids).logits
        hidden = base.model.base_model(inputs_embeds=base.embed(ids)).last_hidden_state
    torch.testing.assert_close(logits_at(base, hidden), expected, **TOLERANCE)
    soft = tiny.make_soft_prompt(base)
    alone = torch.cat([score_batch(base, soft, [row], SEVERAL) for row in ROWS])
    torch.testing.assert_close(score_batch(base, soft, ROWS, SEVERAL), alone, **TOLERANCE)


def test_losses_belong_to_their_rows(llama):
    losses, owner = answer_losses(llama, assemble(llama, None, collate(ANSWERED, "right")))
    assert owner.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert losses.shape == (10,)
