"""PEFT as the independent reference: the same loss and gradient where its padding is right, and proof of where it is not."""

import pytest
import tiny
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from retune.inference.inputs import EncodedRow, assemble, collate
from retune.inference.release import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_release
from retune.inference.scoring import answer_losses, score_batch

ROWS = [EncodedRow([10, 11, 12, 13, 14, 15], [40, 1]), EncodedRow([30, 31], [41, 42, 1]), EncodedRow([50, 51, 52], [1])]


def peft_model(base, kind, soft):
    """PEFT's model with our soft prompt, on a copy of the base model (PEFT changes the one it wraps)."""
    model = tiny.make_model(kind, len(base.tokenizer), dtype=soft.dtype)
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(soft))).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(soft)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("dtype", "loss_tolerance", "gradient_tolerance"), [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-6, 1e-6)])
def test_loss_and_gradient_on_right_padding_are_pefts(kind, dtype, loss_tolerance, gradient_tolerance):
    base = tiny.make_base(kind, dtype=dtype)
    soft = tiny.make_soft_prompt(base, 5).to(dtype)
    batch = collate(ROWS, "right")
    theirs = peft_model(base, kind, soft)
    expected = theirs(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
    expected.backward()
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad

    tuned = soft.clone().requires_grad_(True)
    losses, _ = answer_losses(base, assemble(base, tuned, batch))
    losses.mean().backward()

    assert losses.mean().item() == pytest.approx(expected.item(), rel=loss_tolerance)
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

    alone, padded = peft_scores(collate(rows[:1], "left"))[0], peft_scores(collate(rows, "left"))[0]
    assert (alone - padded).abs().max() > 0.1

    ours = score_batch(base, soft, rows, [[40], [41], [42]])[0]
    torch.testing.assert_close(ours, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_peft_loads_the_adapter_of_a_release_and_computes_the_same(kind, tmp_path):
    base = tiny.make_base(kind)
    soft = tiny.make_soft_prompt(base)
    write_release(tmp_path / "release", tiny.make_prompt(), soft, base, {})
    theirs = PeftModel.from_pretrained(tiny.make_model(kind, len(base.tokenizer)), tmp_path / "release/adapter").eval()
    batch = collate(ROWS, "right")
    inputs = assemble(base, soft, batch)
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids, attention_mask=batch.mask).logits
        found = base.model(inputs_embeds=inputs.embeddings, attention_mask=inputs.mask, position_ids=inputs.positions).logits
    real = inputs.mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_adapter_files_are_byte_for_byte_what_peft_saves(kind, tmp_path):
    base = tiny.make_base(kind)
    soft = tiny.make_soft_prompt(base)
    write_release(tmp_path / "release", tiny.make_prompt(), soft, base, {})
    theirs = peft_model(base, kind, soft)
    theirs.peft_config["default"].base_model_name_or_path = "models/tiny"
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "release" / name).read_bytes() == (tmp_path / name).read_bytes()
