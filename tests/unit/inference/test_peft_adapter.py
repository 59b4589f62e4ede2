"""Adapters that PEFT itself saved load here and compute the same; what is no such adapter is refused by name."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from retune.errors import BadInputError
from retune.inference.decoder import logits_at, run_packed, run_prefix
from retune.inference.inputs import EncodedRow, pack
from retune.inference.predictor import Predictor
from retune.inference.release import read_release, write_release
from retune.peft_adapter import read_adapter

ROWS = [EncodedRow([10, 11, 12, 13, 14, 15]), EncodedRow([30, 31]), EncodedRow([50, 51, 52])]


@pytest.fixture
def saved(llama, tmp_path):
    """An adapter of 4 virtual tokens as PEFT made and saved it, for the tiny llama."""
    save(llama, "llama", tmp_path / "adapter")
    return tmp_path / "adapter"


def save(base, kind, folder, dtype=torch.float32):
    torch.manual_seed(3)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny.make_model(kind, len(base.tokenizer)), config).to(dtype).eval()
    model.save_pretrained(folder, save_embedding_layers=False)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
def test_an_adapter_that_peft_saved_gives_pefts_logits(kind, tmp_path):
    base = tiny.make_base(kind)
    save(base, kind, tmp_path)
    theirs = PeftModel.from_pretrained(tiny.make_model(kind, len(base.tokenizer)), tmp_path).eval()
    soft_prompt = read_adapter(tmp_path, base)["prompt_embeddings"]
    packed = pack(ROWS, 4)
    with torch.no_grad():
        found = logits_at(base, run_packed(base, run_prefix(base, soft_prompt), packed))
        expected = [theirs(input_ids=torch.tensor([ROWS[i].prompt])).logits[0, 4:] for i in packed.order]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=2e-5)


def test_a_read_adapter_serves_and_becomes_a_release(llama, saved, tmp_path):
    tensors = read_adapter(saved, llama)
    answers = Predictor(llama, tiny.make_prompt(), tensors).score_labels(tiny.make_rows(3))
    write_release(tmp_path / "release", tiny.make_prompt(), tensors, llama, {})
    assert torch.equal(Predictor.of(read_release(tmp_path / "release"), llama).score_labels(tiny.make_rows(3)), answers)
    assert torch.equal(read_adapter(tmp_path / "release/adapter", llama)["prompt_embeddings"], tensors["prompt_embeddings"])


def test_half_precision_is_read_as_fp32(llama, tmp_path):
    save(llama, "llama", tmp_path, torch.bfloat16)
    soft_prompt = read_adapter(tmp_path, llama)["prompt_embeddings"]
    assert soft_prompt.dtype == torch.float32
    assert torch.equal(soft_prompt.bfloat16(), load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "P_TUNING"}, "adapter_config.json: peft_type must be 'PROMPT_TUNING', got 'P_TUNING'"),
        ({"task_type": "SEQ_CLS"}, "task_type must be 'CAUSAL_LM', got 'SEQ_CLS'"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules must be 1, got 2"),
        ({"num_virtual_tokens": 5}, r"must be \[num_virtual_tokens, token_dim\] = \[5, 32\], got \[4, 32\]"),
    ],
)
def test_a_config_that_does_not_fit_is_named(llama, saved, changes, message):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadInputError, match=message):
        read_adapter(saved, llama)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": torch.full((4, 32), torch.nan)}, "not finite"),
        ({"prompt_embeddings": torch.zeros(4, 32, dtype=torch.int64)}, r"must be of torch.float32, .*, got torch.int64"),
        ({"prompt_embeddings": torch.zeros(4 * 32)}, r"= \[4, 32\], got \[128\]"),
        (
            {"prompt_embeddings": torch.zeros(4, 32), "embed.weight": torch.zeros(1)},
            "must hold prompt_embeddings alone, got embed",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(llama, saved, tensors, message):
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(BadInputError, match=message):
        read_adapter(saved, llama)


def test_an_adapter_of_a_wider_model_names_both_widths(saved):
    with pytest.raises(BadInputError, match="must have the base model's hidden size 64, got 32; it was tuned on"):
        read_adapter(saved, tiny.make_base("gpt2", n_embd=64))


def test_another_kind_of_adapter_and_a_missing_one_are_refused(llama, tmp_path):
    model = get_peft_model(tiny.make_model("llama", len(llama.tokenizer)), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(BadInputError, match="peft_type must be 'PROMPT_TUNING', got 'LORA'; only prompt tuning is read"):
        read_adapter(tmp_path / "lora", llama)
    with pytest.raises(BadInputError, match=r"adapter_config.json cannot be read: .*No such file"):
        read_adapter(tmp_path / "none", llama)
    (tmp_path / "lora/adapter_config.json").write_text("[]")
    with pytest.raises(BadInputError, match="must hold a JSON object, got list"):
        read_adapter(tmp_path / "lora", llama)


def test_weights_that_are_no_safetensors_are_refused(llama, saved):
    (saved / "adapter_model.safetensors").write_bytes(b"pickle")
    with pytest.raises(BadInputError, match="safe_serialization=True"):
        read_adapter(saved, llama)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"adapter_model.safetensors cannot be read"):
        read_adapter(saved, llama)
