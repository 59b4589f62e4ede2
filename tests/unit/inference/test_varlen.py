"""Attention by a kernel for sequences of many lengths: laid out right, and refused where it is wrong.

torch has that kernel for CUDA alone. Without a GPU its documented contract stands in, sequence by sequence; with one, these tests run it.
"""

import pytest
import tiny
import torch

from retune.inference import attention, decoder, encoder, varlen
from retune.inference.attention import Prefix
from retune.inference.inputs import EncodedRow, LabelTree, pack

ROWS = [EncodedRow([10, 11, 12, 13], [40, 1]), EncodedRow([], [41, 1]), EncodedRow([], [1]), EncodedRow([30, 31], [42, 43, 1])]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def as_documented(q, k, v, queries, keys, most_queries, most_keys, *, scale, window_size, enable_gqa):
    """Of torch.nn.attention.varlen: [T, H, D], [S, G, D], [S, G, D] -> [T, H, D]; causal is aligned to a sequence's last query and key."""
    assert queries.dtype == keys.dtype == torch.int32
    assert (most_queries, most_keys) == (int(queries.diff().max()), int(keys.diff().max()))
    assert queries[-1] == len(q)
    assert keys[-1] == len(k) == len(v)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    out = torch.empty_like(q)
    for sequence in range(len(queries) - 1):
        mine, seen = slice(queries[sequence], queries[sequence + 1]), slice(keys[sequence], keys[sequence + 1])
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            for n, query in enumerate(range(mine.start, mine.stop)):
                end = seen.stop - (mine.stop - mine.start - 1 - n) if window_size == (-1, 0) else seen.stop
                weights = (k[seen.start : end, group] @ q[query, head] * scale).softmax(0)
                out[query, head] = weights @ v[seen.start : end, group]
    return out


@pytest.fixture
def used(monkeypatch):
    """Calls of the kernel, which serves every device and type from here on."""
    calls = []

    def kernel(*given, **named):
        calls.append(1)
        return as_documented(*given, **named)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "has_kernel", lambda q, k: True)
    monkeypatch.setattr(attention, "DENSE", 0)  # the products of a CPU stand aside
    return calls


@pytest.fixture(autouse=True)
def _asked_anew():
    varlen._is_right.cache_clear()
    yield
    varlen._is_right.cache_clear()


def losses_and_gradient(base, prefix_of, soft):
    soft = soft.clone().requires_grad_()
    losses = decoder.answer_losses(base, (prefix := prefix_of(soft)), decoder.lay(base, prefix, ROWS))
    (gradient,) = torch.autograd.grad(losses.sum(), soft)
    return losses.detach(), gradient


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # with fewer key-value heads than query heads, and without
@pytest.mark.parametrize("how", ["with the rows", "before the rows"])
def test_losses_and_gradients_are_those_under_masks(kind, how, request):
    base = tiny.make_base(kind)
    soft = tiny.make_soft_prompt(base, 5)
    run = {"with the rows": lambda vectors: Prefix(vectors=vectors), "before the rows": lambda vectors: decoder.run_prefix(base, vectors)}
    under_masks = losses_and_gradient(base, run[how], soft)
    calls = request.getfixturevalue("used")
    found = losses_and_gradient(base, run[how], soft)
    assert len(calls) == base.model.config.num_hidden_layers
    torch.testing.assert_close(found, under_masks, rtol=1e-4, atol=1e-5)


def test_a_row_alone_without_a_soft_prompt(llama, request):
    rows = [EncodedRow([10, 11, 12], [40, 1])]
    expected = decoder.answer_losses(llama, None, pack(rows, 0))
    calls = request.getfixturevalue("used")
    torch.testing.assert_close(decoder.answer_losses(llama, None, pack(rows, 0)), expected)
    assert calls


def test_what_is_generated_is_the_same_and_label_scores_need_masks(llama, request):
    prefix = decoder.run_prefix(llama, tiny.make_soft_prompt(llama, 5))
    rows, tree = [EncodedRow([10, 11, 12, 13]), EncodedRow([30])], LabelTree([[40, 41], [40, 42], [43]])
    written, scores = list(decoder.generate_steps(llama, prefix, rows, 4)), decoder.score_batch(llama, prefix, rows, tree)
    calls = request.getfixturevalue("used")
    assert list(decoder.generate_steps(llama, prefix, rows, 4)) == written
    assert len(calls) == llama.model.config.num_hidden_layers  # once each: to read the rows
    torch.testing.assert_close(decoder.score_batch(llama, prefix, rows, tree), scores)
    assert len(calls) == llama.model.config.num_hidden_layers


@pytest.mark.parametrize("before", ["vectors", "keys and values", None])
def test_an_encoder_looks_both_ways(before, request):
    base = tiny.make_base("bert")
    rows = [EncodedRow([10, 11, 12, 13]), EncodedRow([30, 31])]
    config = base.model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    drawn = torch.Generator().manual_seed(1)
    given = [tuple(torch.randn(heads, 3, size, generator=drawn) for _ in range(config.num_hidden_layers)) for _ in range(2)]
    prefix = {"vectors": Prefix(vectors=tiny.make_soft_prompt(base, 5)), "keys and values": Prefix(*given), None: None}[before]
    expected = encoder.means(base, prefix, encoder.lay(base, prefix, rows))
    calls = request.getfixturevalue("used")
    torch.testing.assert_close(encoder.means(base, prefix, encoder.lay(base, prefix, rows)), expected)
    assert calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_a_kernel_that_does_what_is_documented_is_taken(device, heads, groups, monkeypatch, caplog):
    if device == "cpu":
        monkeypatch.setattr(varlen, "varlen_attn", as_documented)
    assert varlen._is_right(torch.device(device), heads, groups, 64), caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_in_bf16_losses_and_gradients_are_those_under_masks(monkeypatch):
    base = tiny.make_base("llama", dtype=torch.bfloat16, hidden_size=128)
    base.model.to("cuda")
    soft = tiny.make_soft_prompt(base, 5).cuda()
    found = losses_and_gradient(base, lambda vectors: Prefix(vectors=vectors), soft)
    monkeypatch.setattr(attention, "has_kernel", lambda q, k: False)
    torch.testing.assert_close(found, losses_and_gradient(base, lambda vectors: Prefix(vectors=vectors), soft), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1)])
def test_a_kernel_that_looks_elsewhere_is_refused_and_masks_serve(window, monkeypatch, caplog):
    def other(*given, window_size, **named):
        return as_documented(*given, window_size=window, **named)

    monkeypatch.setattr(varlen, "varlen_attn", other)
    assert not varlen._is_right(torch.device("cpu"), 2, 2, 8)
    assert "the attention kernel for sequences of many lengths is wrong on cpu, masks serve in its place" in caplog.text


def test_where_torch_has_no_kernel_masks_serve(caplog):
    assert not varlen._is_right(torch.device("cpu"), 2, 2, 8)  # torch itself: it has none for this device
    assert "no attention kernel for sequences of many lengths on cpu, masks serve in its place: " in caplog.text
    q = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    assert not varlen.has_kernel(q, q)
