import pytest
import tiny
import torch
from transformers.pytorch_utils import Conv1D

from retune.config import Tune
from retune.inference import decoder
from retune.inference.attention import Prefix
from retune.inference.base_model import ARCHITECTURES, load_base
from retune.inference.encoding import Encoder
from retune.inference.families import family_of
from retune.inference.inputs import encode_with_answers
from retune.inference.precision import fast_bf16, multiply_in_fp32
from retune.inference.predictor import Predictor
from retune.prompt_tuning.methods import METHODS

ROWS = tiny.make_rows(12)
LABELS = 3
ROUNDED = {"gemma", "mt5", "t5"}
"""Here transformers itself brings some hidden states to the weights' type."""


def rounded(kind):
    """The base model with weights that bf16 holds, kept as fp32 and kept as bf16."""
    plain, small = (tiny.make_base(kind, dtype=torch.bfloat16) for _ in range(2))
    plain.model.float()
    multiply_in_fp32(small.model)
    return plain, small


def loss_and_gradient(base, soft):
    """Loss of each answer token of the rows, and the gradient that their mean has at the soft prompt."""
    prompt = tiny.make_prompt()
    values = soft.clone().requires_grad_(True)
    family, prefix = family_of(base), Prefix(vectors=values)
    rows = encode_with_answers(base, Encoder(prompt, base.tokenizer, base.family, ()), len(soft), ROWS)[0]
    losses = family.answer_losses(base, prefix, family.lay(base, prefix, rows))
    losses.mean().backward()
    return losses.detach(), values.grad


@pytest.mark.parametrize("tokens", [7, 4096])
@pytest.mark.parametrize("kind", sorted(kind for kind, family in ARCHITECTURES.items() if family != "encoder"))
def test_bf16_weights_multiplied_in_fp32_are_the_rounded_model_in_fp32(kind, tokens, monkeypatch):
    monkeypatch.setattr(decoder, "TOKENS", tokens)
    plain, small = rounded(kind)
    soft = tiny.make_soft_prompt(plain)
    (loss, gradient), (other, own) = (loss_and_gradient(base, soft) for base in (plain, small))
    assert other.dtype == torch.float32
    near = 0.02 if kind in ROUNDED else 1e-6
    torch.testing.assert_close(other, loss, rtol=near, atol=near)
    assert (own - gradient).norm() <= 5 * near * gradient.norm()


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "qwen2"])
def test_labels_are_scored_as_by_the_rounded_model(kind):
    plain, small = rounded(kind)
    head = {"classifier.weight": torch.randn(LABELS, plain.hidden_size), "classifier.bias": torch.randn(LABELS)}
    tensors = tiny.tuned(tiny.make_soft_prompt(plain)) | (head if plain.family == "encoder" else {})
    expected, found = (Predictor(base, tiny.make_prompt(), tensors).score_labels(ROWS) for base in (plain, small))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_text_is_generated_as_by_the_rounded_model():
    plain, small = rounded("llama")
    tensors = tiny.tuned(tiny.make_soft_prompt(plain))
    expected, found = (list(Predictor(base, tiny.make_summary_prompt(), tensors).generate(ROWS)) for base in (plain, small))
    assert found == expected


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "prefix_tuning"),
        ("llama", "p_tuning"),
        *((kind, method) for kind in ("llama", "gpt2", "t5") for method in ("lora", "ia3")),
    ],
)
def test_other_methods_tune_through_it(kind, method):
    losses = []
    for base in rounded(kind):
        tuned = METHODS[method](base, Tune(method=method, num_virtual_tokens=4))
        prompt = tiny.make_prompt(tune={"method": method, "num_virtual_tokens": 4})
        rows = encode_with_answers(tuned.base, Encoder(prompt, base.tokenizer, base.family, ()), tuned.size, ROWS)[0]
        prefix = tuned.prefix()
        losses.append(family_of(tuned.base).answer_losses(tuned.base, prefix, family_of(tuned.base).lay(tuned.base, prefix, rows)).mean())
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in tuned.parameters.values())
    near = 0.02 if kind in ROUNDED else 1e-6
    torch.testing.assert_close(losses[1], losses[0], rtol=near, atol=near)


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_every_product_is_of_fp32(kind):
    _, small = rounded(kind)
    types = set()
    for layer in small.model.modules():
        if isinstance(layer, torch.nn.Linear | Conv1D):
            layer.register_forward_hook(lambda _, given, made: types.add(made.dtype))
    loss_and_gradient(small, tiny.make_soft_prompt(small))
    assert types == {torch.float32}


def test_no_widened_matrix_is_kept_for_the_backward_pass():
    _, small = rounded("llama")
    matrices = {tuple(p.shape) for p in small.model.parameters() if p.ndim == 2}
    matrices |= {shape[::-1] for shape in matrices}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_and_gradient(small, tiny.make_soft_prompt(small))
    assert any(tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in matrices for tensor in kept)
    assert not [tuple(tensor.shape) for tensor in kept if tensor.dtype == torch.float32 and tuple(tensor.shape) in matrices]


def test_matrices_stay_as_small_as_they_are():
    _, small = rounded("llama")
    assert {p.dtype for p in small.model.parameters() if p.ndim == 2} == {torch.bfloat16}
    assert {p.dtype for p in small.model.parameters() if p.ndim == 1} == {torch.float32}


@pytest.mark.parametrize(
    ("found", "fast"),
    [
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"architecture": "x86_64", "avx2": True, "cpu_name": "AMD EPYC"}, False),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_the_processor_decides(found, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert fast_bf16() is fast


@pytest.mark.parametrize("fast", [True, False])
def test_a_model_is_loaded_as_the_processor_multiplies(fast, tmp_path, monkeypatch, caplog):
    tiny.save_base(tmp_path)
    monkeypatch.setattr("retune.inference.base_model.fast_bf16", lambda: fast)
    base = load_base(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert base.dtype == (torch.bfloat16 if fast else torch.float32)
    assert base.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert ("bf16 weights are multiplied in fp32" in caplog.text) is not fast
    assert load_base(tmp_path, device="cpu").dtype == torch.float32
