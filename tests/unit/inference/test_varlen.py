"""Attention by a kernel for sequences of many lengths: laid out right, and refused where it is wrong.

torch has that kernel for CUDA alone. Without a GPU its contract as FlashAttention-2 has it stands in, sequence by sequence; with one, these
tests run it.
"""

from types import SimpleNamespace

import pytest
import tiny
import torch

from retune.inference import attention, decoder, encoder, varlen
from retune.inference.attention import Prefix
from retune.inference.inputs import EncodedRow, LabelTree, pack

ROWS = [EncodedRow([10, 11, 12, 13], [40, 1]), EncodedRow([], [41, 1]), EncodedRow([], [1]), EncodedRow([30, 31], [42, 43, 1])]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def as_flash_attention(q, k, v, queries, keys, most_queries, most_keys, *, scale, window_size, enable_gqa):
    """[T, H, D], [S, G, D], [S, G, D] -> [T, H, D]; causal is aligned to a sequence's last query and key."""
    assert queries.dtype == keys.dtype == torch.int32
    assert (most_queries, most_keys) == (int(queries.diff().max()), int(keys.diff().max()))
    assert queries[-1] == len(q)
    assert keys[-1] == len(k) == len(v)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    out = []
    for sequence in range(len(queries) - 1):
        mine, seen = slice(queries[sequence], queries[sequence + 1]), slice(keys[sequence], keys[sequence + 1])
        for n, query in enumerate(range(mine.start, mine.stop)):
            end = seen.stop - (mine.stop - mine.start - 1 - n) if window_size == (-1, 0) else seen.stop
            by_group = q[query].reshape(k.shape[1], -1, q.shape[2])  # [G, H / G, D]
            weights = (by_group @ k[seen.start : end].permute(1, 2, 0) * scale).softmax(-1)
            out.append((weights @ v[seen.start : end].transpose(0, 1)).reshape(q.shape[1:]))
    return torch.stack(out)


@pytest.fixture
def used(monkeypatch):
    """Calls of the kernel, which serves every device and type from here on."""
    calls = []

    def kernel(*given, **named):
        calls.append(1)
        return as_flash_attention(*given, **named)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "has_kernel", lambda q, k: True)
    monkeypatch.setattr(attention, "DENSE", 0)  # the products of a CPU stand aside
    return calls


@pytest.fixture(autouse=True)
def _asked_anew():
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
def test_a_kernel_that_does_what_it_should_is_taken(device, heads, groups, monkeypatch, caplog):
    if device == "cpu":
        monkeypatch.setattr(varlen, "varlen_attn", as_flash_attention)
    assert varlen._is_right(torch.device(device), heads, groups, 16), caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_in_bf16_losses_and_gradients_are_those_under_masks(monkeypatch):
    base = tiny.make_base("llama", dtype=torch.bfloat16, std=0.05)
    base.model.to("cuda")
    soft = tiny.make_soft_prompt(base, 5).cuda()
    found = losses_and_gradient(base, lambda vectors: Prefix(vectors=vectors), soft)
    assert varlen._is_right.cache_info().currsize == 1
    assert varlen._is_right(base.device, 4, 2, 8), "the kernel was refused: masks stand against masks"
    assert varlen._is_right.cache_info().currsize == 1, "another size of heads was asked for"
    monkeypatch.setattr(attention, "has_kernel", lambda q, k: False)
    for one, other in zip(found, losses_and_gradient(base, lambda vectors: Prefix(vectors=vectors), soft), strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


def to_the_first_key(q, k, v, queries, keys, *most, window_size, **named):
    """Causal attention aligned at a sequence's beginning: row n of its queries sees n keys."""
    out = []
    for sequence in range(len(queries) - 1):
        mine, first = slice(queries[sequence], queries[sequence + 1]), int(keys[sequence])
        end = first + mine.stop - mine.start if window_size == (-1, 0) else int(keys[sequence + 1])
        alone = torch.tensor([0, mine.stop - mine.start], dtype=torch.int32), torch.tensor([0, end - first], dtype=torch.int32)
        longest = int(alone[0][1]), int(alone[1][1])
        out.append(as_flash_attention(q[mine], k[first:end], v[first:end], *alone, *longest, window_size=window_size, **named))
    return torch.cat(out)


WRONG = {
    "causal always": lambda *given, window_size, **named: as_flash_attention(*given, window_size=(-1, 0), **named),
    "causal never": lambda *given, window_size, **named: as_flash_attention(*given, window_size=(-1, -1), **named),
    "aligned to the first key": to_the_first_key,
    "without the scale": lambda *given, scale, **named: as_flash_attention(*given, scale=given[0].shape[-1] ** -0.5, **named),
    "not a number": lambda *given, **named: as_flash_attention(*given, **named) * torch.nan,
    "no gradient of keys": lambda q, k, *given, **named: as_flash_attention(q, k.detach() + 0 * k, *given, **named),
    "a gradient that is not a number": lambda q, k, *given, **named: as_flash_attention(q, k, *given, **named) + 0 * (k - k).sqrt().sum(),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_kernel_that_does_something_else_is_refused_and_masks_serve(how, monkeypatch, caplog):
    monkeypatch.setattr(varlen, "varlen_attn", WRONG[how])
    assert not varlen._is_right(torch.device("cpu"), 2, 2, 8)
    assert "the attention kernel for sequences of many lengths is wrong on cpu, masks serve in its place" in caplog.text


def test_where_torch_has_no_kernel_masks_serve(caplog):
    assert not varlen._is_right(torch.device("cpu"), 2, 2, 8)  # torch itself: it has none for this device
    assert "no attention kernel for sequences of many lengths on cpu, masks serve in its place: " in caplog.text


def test_want_of_memory_says_nothing_about_the_kernel(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(varlen, "varlen_attn", full)
    with pytest.raises(torch.OutOfMemoryError):
        varlen._is_right(torch.device("cpu"), 2, 2, 8)
    monkeypatch.setattr(varlen, "varlen_attn", as_flash_attention)
    assert varlen._is_right(torch.device("cpu"), 2, 2, 8)


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "asked"), [(True, torch.bfloat16, True), (True, torch.float32, False), (False, torch.bfloat16, False)]
)
def test_the_kernel_serves_bf16_on_a_gpu(is_cuda, dtype, asked, monkeypatch):
    probed = []
    monkeypatch.setattr(varlen, "_is_right", lambda *given: probed.append(given) or True)
    q = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="cuda:1", shape=(4, 30, 64))
    assert varlen.has_kernel(q, SimpleNamespace(shape=(2, 50, 64))) == asked
    assert probed == [("cuda:1", 4, 2, 64)] * asked
