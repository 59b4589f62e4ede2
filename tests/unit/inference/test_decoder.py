"""A batch equals its rows alone, in any order and any chunk; the prefix and the cache change nothing; transformers agrees."""

from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from retune.inference import attention, decoder, families, inputs
from retune.inference.attention import Prefix
from retune.inference.base_model import ARCHITECTURES
from retune.inference.decoder import answer_losses, logits_at, run_packed, run_prefix
from retune.inference.inputs import EncodedRow, LabelTree, pack

PROMPTS = [[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [30], [31, 32, 33, 34], [10, 11, 12, 13]]
ROWS = [EncodedRow(p) for p in PROMPTS]
ANSWERED = [EncodedRow(p, [60 + i] * (i + 1)) for i, p in enumerate(PROMPTS)]
SINGLE, SEVERAL = [[40], [41], [42]], [[40], [41, 42], [41, 43, 44, 45], [46, 47]]
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def prefix_of(base, soft):
    with torch.no_grad():
        return None if soft is None else run_prefix(base, soft)


def score_batch(base, soft, rows, labels):
    return decoder.score_batch(base, prefix_of(base, soft), rows, LabelTree(labels))


def generate_batch(base, soft, rows, new, **more):
    return families.generate_batch(base, prefix_of(base, soft), rows, new, **more)


def losses_of(base, soft, rows):
    return families.row_losses(base, prefix_of(base, soft), pack(rows, 0 if soft is None else len(soft)))


fresh = cache(tiny.make_model)


def plain(base):
    """The same weights in transformers' own layers: those of a base model are changed when it is first run (`retune.inference.lean`)."""
    return fresh(base.model.config.model_type, base.vocabulary)


def whole_logits(base, soft, ids):
    """One unpadded row through the model's own forward, without a cache: [P+T, V]."""
    parts = [base.embed(torch.tensor(ids))] if soft is None else [soft, base.embed(torch.tensor(ids))]
    with torch.no_grad():
        return plain(base)(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]


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
    assert losses_of(base, soft, ANSWERED) == pytest.approx(expected, abs=1e-4)


def test_the_logits_of_all_packed_tokens_are_those_of_each_row_alone(base, soft):
    packed = pack(ROWS, 0 if soft is None else len(soft))
    with torch.no_grad():
        found = logits_at(base, run_packed(base, prefix_of(base, soft), packed))
    alone = [whole_logits(base, soft, PROMPTS[i])[-len(PROMPTS[i]) :] for i in packed.order]
    torch.testing.assert_close(found, torch.cat(alone), **TOLERANCE)


@pytest.mark.parametrize(("chunk", "dense"), [(1, 512), (10**6, 512), (128, 0)], ids=["row by row", "all in one", "torch's attention"])
@pytest.mark.parametrize("together", [False, True])
def test_neither_chunks_nor_the_kernel_change_a_loss_or_its_gradient(base, monkeypatch, chunk, dense, together):
    def loss_and_gradient():
        soft = tiny.make_soft_prompt(base, 6).requires_grad_(True)
        prefix = Prefix(vectors=soft) if together else run_prefix(base, soft)
        loss = answer_losses(base, prefix, pack(ANSWERED, 6)).mean()
        loss.backward()
        return loss.detach(), soft.grad

    expected = loss_and_gradient()
    monkeypatch.setattr(inputs, "CHUNK", chunk)
    monkeypatch.setattr(attention, "DENSE", dense)
    loss, gradient = loss_and_gradient()
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert ((gradient - expected[1]).norm() / expected[1].norm()).item() < 1e-5


@pytest.mark.parametrize(("held", "tokens"), [(1, 1), (1, 100), (2**24, 7), (2**24, 4096)])
def test_losses_computed_part_by_part_are_torchs_cross_entropy(llama, monkeypatch, held, tokens):
    monkeypatch.setattr(decoder, "LOGITS", held)
    monkeypatch.setattr(decoder, "TOKENS", tokens)
    soft = tiny.make_soft_prompt(llama).requires_grad_(True)
    packed = pack(ANSWERED, len(soft))
    prefix = run_prefix(llama, soft)
    losses = answer_losses(llama, prefix, packed)
    weights = torch.arange(1.0, len(losses) + 1)
    (losses @ weights).backward(retain_graph=True)
    found, soft.grad = soft.grad, None
    hidden = run_packed(llama, prefix, packed).index_select(0, packed.sources)
    expected = torch.nn.functional.cross_entropy(logits_at(llama, hidden), packed.targets, reduction="none")
    torch.testing.assert_close(losses, expected, **TOLERANCE)
    (expected @ weights).backward()
    torch.testing.assert_close(found, soft.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 50)])
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_a_loss_and_its_gradient_are_right_to_fp32s_last_digits_where_an_answer_is_sure_too(monkeypatch, tokens, sharpness, bias):
    monkeypatch.setattr(decoder, "TOKENS", tokens)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    hidden = (torch.randn(50, 8, generator=generator) * sharpness).requires_grad_(True)
    targets = (hidden @ weight.T).argmax(1)
    targets[::3] = torch.arange(0, 50, 3)
    losses = decoder._HeadLoss.apply(hidden, weight, bias, targets)
    losses.sum().backward()
    exact = hidden.detach().double().requires_grad_(True)
    logits = F.linear(exact, weight.double(), None if bias is None else bias.double())
    target = logits.gather(1, targets[:, None])
    # torch's cross entropy, in fp64 too, is 0 where the target is as good as sure.
    expected = F.softplus((logits.scatter(1, targets[:, None], float("-inf")).logsumexp(1, keepdim=True) - target)[:, 0], threshold=700)
    torch.testing.assert_close(expected, F.cross_entropy(logits, targets, reduction="none"))
    expected.sum().backward()
    assert expected.min() < (1e-10 if sharpness > 1 else 0.5)
    # fp32 logits of some hundreds are off by some 1e-5, and the share of what is not the target by as much, relatively.
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5 * sharpness, atol=1e-37)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5 * sharpness, atol=1e-5 * float(exact.grad.abs().max()))
    sure = expected < 1e-3
    assert sure.any() or sharpness == 1
    error = (hidden.grad[sure].double() - exact.grad[sure]).norm(dim=1) / exact.grad[sure].norm(dim=1)
    assert (error[expected[sure] > 1e-30] < 1e-5 * sharpness).all()


@pytest.mark.parametrize("tokens", [1, 2, 4096])
def test_losses_of_odd_vocabularies_and_targets(monkeypatch, tokens):
    monkeypatch.setattr(decoder, "TOKENS", tokens)
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with torch.no_grad():
        losses = decoder._HeadLoss.apply(hidden, weight, None, torch.tensor([4, 5, 0]))
        # A token that the vocabulary lacks has no likelihood, rather than a wrong one.
        assert losses.isnan().tolist() == [False, True, False]
        assert decoder._HeadLoss.apply(hidden[:0], weight, None, torch.tensor([], dtype=torch.long)).shape == (0,)
    only = hidden.clone().requires_grad_(True)
    losses = decoder._HeadLoss.apply(only, weight[:1], None, torch.zeros(3, dtype=torch.long))
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0]
    assert not only.grad.any()


row_strategy = st.lists(st.integers(3, 250), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(row_strategy, min_size=1, max_size=6),
    labels=st.lists(st.lists(st.integers(3, 250), min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple),
    size=st.sampled_from([1, 3, 17]),
    seed=st.integers(0, 5),
)
def test_any_rows_score_and_read_in_company_as_alone(base, prompts, labels, size, seed):
    """Rows without a prompt of their own, equal rows, labels that begin others: all are allowed here."""
    soft = tiny.make_soft_prompt(base, size, seed)
    rows = [EncodedRow(p) for p in prompts]
    together = score_batch(base, soft, rows, labels)
    expected = torch.tensor([[log_probability(base, soft, p, label) for label in labels] for p in prompts])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=5e-5)
    answered = [EncodedRow(p, labels[0]) for p in prompts]
    assert losses_of(base, soft, answered) == pytest.approx([-x for x in expected[:, 0].tolist()], abs=2e-4)
    turned = score_batch(base, soft, rows[::-1], labels).flip(0)
    torch.testing.assert_close(turned, together, rtol=1e-5, atol=5e-5)


def test_rows_without_a_prompt_are_answered_by_the_soft_prompt_alone(base):
    soft = tiny.make_soft_prompt(base)
    empty = EncodedRow([])
    assert generate_batch(base, soft, [empty, *ROWS], 6) == [generate_batch(base, soft, [row], 6)[0] for row in [empty, *ROWS]]


def test_a_batch_of_which_nothing_is_read_trains_the_soft_prompt(base):
    rows, losses, gradients = [EncodedRow([], [7]), EncodedRow([], [9])], [], []
    for together in (True, False):
        soft = tiny.make_soft_prompt(base).requires_grad_(True)
        losses.append(answer_losses(base, Prefix(vectors=soft) if together else run_prefix(base, soft), pack(rows, len(soft))))
        losses[-1].sum().backward()
        gradients.append(soft.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert gradients[0].abs().max() > 0.1


def test_a_sliding_window_bounds_the_context(llama):
    model = tiny.make_base("mistral", sliding_window=20)
    assert model.context == 20
    assert tiny.make_base("mistral", sliding_window=None).context == llama.context == 256


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
    """Row by row, the soft prompt as embeddings before it."""
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = []
    for prompt in PROMPTS:
        vectors = torch.cat([*([] if soft is None else [soft]), base.embed(torch.tensor(prompt))])[None]
        mask = torch.ones(vectors.shape[:2], dtype=torch.long)
        theirs += plain(base).generate(inputs_embeds=vectors, attention_mask=mask, generation_config=config).tolist()
    mute = replace(base, tokenizer=_NoEnd())
    mute.model.generation_config, before = GenerationConfig(), mute.model.generation_config
    try:
        assert generate_batch(mute, soft, ROWS, 10) == theirs
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


@pytest.mark.parametrize("kind", sorted(kind for kind, family in ARCHITECTURES.items() if family == "decoder"))
def test_an_allowed_architecture_has_plain_logits_and_follows_positions(kind):
    """The head is the output embedding alone, inputs_embeds equal input_ids, and rows packed after a prefix read as alone."""
    base = tiny.make_base(kind)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = base.model(input_ids=ids).logits
        hidden = base.model.base_model(inputs_embeds=base.embed(ids)).last_hidden_state
    torch.testing.assert_close(logits_at(base, hidden), expected, **TOLERANCE)
    soft = tiny.make_soft_prompt(base)
    expected = torch.tensor([[log_probability(base, soft, p, label) for label in SEVERAL] for p in PROMPTS])
    torch.testing.assert_close(score_batch(base, soft, ROWS, SEVERAL), expected, **TOLERANCE)


def test_losses_belong_to_their_rows(llama):
    packed = pack(ANSWERED, 0)
    assert sorted(packed.owners.tolist()) == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert answer_losses(llama, None, packed).shape == (10,)
