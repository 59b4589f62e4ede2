"""PEFT as the independent reference: the same loss and gradient where its padding is right, and proof of where it is not."""

import pytest
import tiny
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from retune.inference.attention import Prefix
from retune.inference.base_model import ARCHITECTURES
from retune.inference.decoder import answer_losses, logits_at, run_packed, run_prefix, score_batch
from retune.inference.inputs import EncodedRow, LabelTree, pack
from retune.inference.release import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_release

ROWS = [EncodedRow([10, 11, 12, 13, 14, 15], [40, 1]), EncodedRow([30, 31], [41, 42, 1]), EncodedRow([50, 51, 52], [1])]


def peft_model(base, kind, soft, **more):
    """PEFT's model with our soft prompt, on a copy of the base model (PEFT changes the one it wraps)."""
    model = tiny.make_model(kind, len(base.tokenizer), dtype=soft.dtype, **more)
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(soft))).to(soft.dtype).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(soft)
    return model


@pytest.mark.parametrize("kind", sorted(kind for kind, family in ARCHITECTURES.items() if family == "decoder"))
@pytest.mark.parametrize("size", [1, 20, 100])
@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_loss_and_gradient_are_pefts(kind, size, padding, dtype):
    """Where PEFT's padding is right, and row by row without any: all rows in one packed run against PEFT's batch.

    fp64 is bounded by transformers' own fp32: its loss casts the logits, its RMS norms compute in it.
    """
    loss_tolerance, gradient_tolerance = (1e-6, 1e-5) if dtype == torch.float32 else (1e-7, 1e-6)
    base = tiny.make_base(kind, dtype=dtype, std=0.1)
    soft = tiny.make_soft_prompt(base, size).to(dtype)
    theirs = peft_model(base, kind, soft, std=0.1)
    tokens = sum(len(row.answer) for row in ROWS)
    batches = [ROWS] if padding == "right" else [[row] for row in ROWS]
    expected = 0.0
    for rows in batches:
        batch = tiny.padded(rows, "right")
        loss = theirs(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
        loss = loss * sum(len(row.answer) for row in rows) / tokens
        loss.backward()
        expected += loss.item()
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad

    for run in (lambda vectors: Prefix(vectors=vectors), lambda vectors: run_prefix(base, vectors)):  # with the rows, and before them
        tuned = soft.clone().requires_grad_(True)
        loss = answer_losses(base, run(tuned), pack(ROWS, size, dtype=dtype)).mean()
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=loss_tolerance)
        assert ((tuned.grad - gradient).norm() / gradient.norm()).item() < gradient_tolerance


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_pefts_left_padding_changes_a_row_and_ours_does_not(kind):
    """If PEFT is repaired, this test says so, and the comment in inputs.py may go."""
    base = tiny.make_base(kind)
    soft = tiny.make_soft_prompt(base, 5)
    theirs = peft_model(base, kind, soft)
    rows = [EncodedRow([30, 31]), EncodedRow(list(range(10, 20)))]

    def peft_scores(batch):
        with torch.no_grad():
            return theirs(input_ids=batch.ids, attention_mask=batch.mask).logits[:, -1].log_softmax(-1)[:, [40, 41, 42]]

    alone, padded = peft_scores(tiny.padded(rows[:1], "left"))[0], peft_scores(tiny.padded(rows, "left"))[0]
    assert (alone - padded).abs().max() > 0.1

    ours = score_batch(base, run_prefix(base, soft), rows, LabelTree([[40], [41], [42]]))[0]
    torch.testing.assert_close(ours, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_peft_loads_the_adapter_of_a_release_and_computes_the_same(kind, tmp_path):
    base = tiny.make_base(kind)
    soft = tiny.make_soft_prompt(base)
    write_release(tmp_path / "release", tiny.make_prompt(), tiny.tuned(soft), base, {})
    theirs = PeftModel.from_pretrained(tiny.make_model(kind, len(base.tokenizer)), tmp_path / "release/adapter").eval()
    batch, packed = tiny.padded(ROWS, "right"), pack(ROWS, len(soft))
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids, attention_mask=batch.mask).logits[:, len(soft) :]
        found = logits_at(base, run_packed(base, run_prefix(base, soft), packed))
    in_order = torch.cat([expected[i, : len(ROWS[i].read)] for i in packed.order])
    torch.testing.assert_close(found, in_order, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_adapter_files_are_byte_for_byte_what_peft_saves(kind, tmp_path):
    base = tiny.make_base(kind)
    soft = tiny.make_soft_prompt(base)
    write_release(tmp_path / "release", tiny.make_prompt(), tiny.tuned(soft), base, {})
    theirs = peft_model(base, kind, soft)
    theirs.peft_config["default"].base_model_name_or_path = "models/tiny"
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "release" / name).read_bytes() == (tmp_path / name).read_bytes()
