"""Encoders and encoder-decoders: what transformers and PEFT compute, for rows in any company."""

import logging

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from retune.errors import BadInputError, IntegrityError
from retune.inference import encoder, encoder_decoder
from retune.inference.adapters import tuned_model
from retune.inference.base_model import ARCHITECTURES, load_base
from retune.inference.encoding import Encoder
from retune.inference.families import family_of, generate_batch
from retune.inference.inputs import EncodedRow, check_length, encode_with_answers
from retune.inference.predictor import Predictor
from retune.inference.release import read_release, write_release
from retune.prompt_tuning import tune
from retune.prompt_tuning.checkpoints import Checkpoint
from retune.prompt_tuning.trainer import VALIDATION_TOKENS, validation_batches

ENCODERS = ["bert", "roberta", "xlm-roberta"]
WRITERS = ["mt5", "t5"]
LAYERS = {"encoder": ["value", "output.dense"], "encoder-decoder": ["v", "wo"]}
METHODS = ["prompt_tuning", "p_tuning", "prefix_tuning", "lora", "ia3", "full", "none"]
OFFERED = [(kind, method) for kind in ("bert", "roberta", "t5") for method in METHODS if (kind, method) != ("t5", "prefix_tuning")]
ROWS = tiny.make_rows(24, seed=3)
HEAD = {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}


def make_prompt(kind, method="prompt_tuning", maker=tiny.make_prompt, **changes):
    settings = {"method": method, "num_virtual_tokens": 4, "epochs": 6, "batch_size": 8, "warmup_steps": 2, "validate_every": 3}
    settings |= {"target_modules": LAYERS[ARCHITECTURES[kind]], "learning_rate": 0.005 if method == "full" else 0.03}
    return maker(tune=settings, **changes)


def encoded(base, prompt):
    return encode_with_answers(base, Encoder(prompt, base.tokenizer, base.family), 4, ROWS)[0]


def padded(rows, value=0):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def there(rows):
    return padded([[1] * len(row) for row in rows])


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("size", [0, 1, 20])
def test_an_encoders_means_are_those_of_transformers_own_padded_forward(kind, size):
    base, model = tiny.make_base(kind), tiny.make_model(kind, len(tiny.make_tokenizer()))
    rows = encoded(base, make_prompt(kind))
    soft = tiny.make_soft_prompt(base, size)
    prefix = encoder.run_prefix(base, soft) if size else None
    ids, mask = padded([row.prompt for row in rows]), there([row.prompt for row in rows])
    vectors = torch.cat([soft.expand(len(rows), -1, -1), base.embed(ids)], 1)
    hidden = model(inputs_embeds=vectors, attention_mask=torch.cat([torch.ones(len(rows), size), mask], 1)).last_hidden_state[:, size:]
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(encoder.means(base, prefix, encoder.lay(base, prefix, rows)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_encoder_decoders_losses_are_transformers_own(kind):
    base = tiny.make_base(kind)
    rows = encoded(base, make_prompt(kind))
    soft = tiny.make_soft_prompt(base).requires_grad_(True)
    prefix = encoder_decoder.run_prefix(base, soft)
    losses = encoder_decoder.answer_losses(base, prefix, encoder_decoder.lay(base, prefix, rows))
    (found,) = torch.autograd.grad(losses.sum(), soft)
    total, gradient = 0.0, torch.zeros_like(soft)
    for row in rows:  # each alone, as the model's own loss reads it
        vectors = torch.cat([soft, base.embed(torch.tensor(row.prompt))])[None]
        answer = torch.tensor([row.answer])
        loss = base.model(inputs_embeds=vectors, labels=answer).loss * len(row.answer)
        total += loss.item()
        gradient += torch.autograd.grad(loss, soft)[0]
    assert losses.sum().item() == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("kind", WRITERS)
def test_an_encoder_decoder_writes_what_transformers_generate_writes(kind):
    base = tiny.make_base(kind)
    rows = encoded(base, make_prompt(kind, maker=tiny.make_summary_prompt))
    prefix = encoder_decoder.run_prefix(base, soft := tiny.make_soft_prompt(base))
    settings = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
    expected = []
    for row in rows:
        vectors = torch.cat([soft, base.embed(torch.tensor(row.prompt))])[None]
        (ids,) = base.model.generate(
            inputs_embeds=vectors, attention_mask=torch.ones(vectors.shape[:2]), generation_config=settings
        ).tolist()
        expected.append([i for i in ids[1:] if i != 1])
    assert generate_batch(base, prefix, rows, 10) == expected
    assert any(len(ids) > 1 for ids in expected)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_rows_scores_are_those_of_the_row_alone_in_any_order(kind):
    base = tiny.make_base(kind)
    prompt = make_prompt(kind)
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)} if kind == "bert" else {}
    predictor = Predictor(base, prompt, tiny.tuned(tiny.make_soft_prompt(base)) | head)
    together = predictor.score_labels(ROWS)
    torch.testing.assert_close(predictor.score_labels(ROWS[::-1]).flip(0), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([predictor.score_labels([row]) for row in ROWS]), together, rtol=0, atol=2e-5)
    assert len(set(predictor.predict(ROWS)["prediction"])) > 1


def test_an_encoder_decoders_scores_are_its_losses_of_the_labels_words(monkeypatch):
    base, prompt = tiny.make_base("t5"), make_prompt("t5", labels={"low": "low", "medium": "medium please", "high": "high"})
    predictor = Predictor(base, prompt, tiny.tuned(tiny.make_soft_prompt(base)))
    texts = Encoder(prompt, base.tokenizer, base.family)
    soft = encoder_decoder.run_prefix(base, predictor.soft_prompt)
    expected = []
    for label in texts.labels():
        rows = [EncodedRow(ids, label) for ids in texts.prompts(ROWS)]
        laid = encoder_decoder.lay(base, soft, rows)
        losses = encoder_decoder.answer_losses(base, soft, laid)
        expected.append(torch.zeros(len(rows)).index_add(0, laid.owners, -losses.detach()))
    torch.testing.assert_close(predictor.score_labels(ROWS), torch.stack(expected, 1), rtol=0, atol=1e-4)
    whole = predictor.score_labels(ROWS)
    monkeypatch.setattr(encoder_decoder, "LOGITS", 1)
    torch.testing.assert_close(predictor.score_labels(ROWS), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "method"), OFFERED)
def test_every_method_learns_and_its_release_is_served_as_it_was_tuned(kind, method, tmp_path, caplog):
    made = tiny.save_base(tmp_path / "models/tiny", kind, std=0.15)
    prompt = make_prompt(kind, method, base_model=tiny.reference(made))
    with caplog.at_level(logging.WARNING):
        result = tune(made, prompt, tiny.make_rows(64), ROWS)
    if method != "none":
        assert result.best_validation_loss < 0.98 * result.initial_validation_loss
        assert "without the fast path" in caplog.text
    write_release(tmp_path / "release", prompt, result.best, made, {})
    served = Predictor.load(tmp_path / "release", project=tmp_path)
    direct = Predictor(made, prompt, result.best)
    torch.testing.assert_close(served.score_labels(ROWS), direct.score_labels(ROWS), rtol=0, atol=1e-4)
    base, prefix = tuned_model(made, prompt, read_release(tmp_path / "release").tensors)
    laid = family_of(base).lay(base, prefix, encoded(made, prompt))
    loss = family_of(base).answer_losses(base, prefix, laid).mean().item()
    assert loss == pytest.approx(result.best_validation_loss, rel=1e-4)


@pytest.mark.parametrize(("kind", "method"), [pair for pair in OFFERED if pair[1] not in ("full", "none")])
def test_peft_loads_the_adapter_and_computes_the_same(kind, method, tmp_path):
    base = tiny.make_base(kind)
    prompt = make_prompt(kind, method)
    result = tune(base, prompt, tiny.make_rows(32), ROWS)
    write_release(tmp_path / "release", prompt, result.best, base, {})
    theirs = PeftModel.from_pretrained(tiny.make_model(kind, len(base.tokenizer)), tmp_path / "release/adapter").eval()
    tuned, prefix = tuned_model(base, prompt, result.best)
    rows = encoded(base, prompt)
    ids, mask = padded([row.prompt for row in rows]), there([row.prompt for row in rows])
    laid = family_of(tuned).lay(tuned, prefix, rows)
    with torch.no_grad():
        if base.family == "encoder":
            hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state[:, -ids.shape[1] :]
            expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found = encoder.means(tuned, prefix, laid)
        else:
            answers = padded([row.answer for row in rows], -100)
            expected = theirs(input_ids=ids, attention_mask=mask, labels=answers).loss
            found = encoder_decoder.answer_losses(tuned, prefix, laid).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_what_a_family_does_not_offer_is_refused(tmp_path):
    bert, t5 = tiny.make_base("bert"), tiny.make_base("t5")
    with pytest.raises(BadInputError, match=r"ticket_priority: task must be classification on a base model of type bert \(encoder\)"):
        tune(bert, make_prompt("bert", maker=tiny.make_summary_prompt), ROWS, ROWS)
    with pytest.raises(BadInputError, match=r"prefix_tuning is not offered on a base model of type t5 \(encoder-decoder\); use prompt_tun"):
        tune(t5, make_prompt("t5", "prefix_tuning"), ROWS, ROWS)
    with pytest.raises(BadInputError, match="a soft prompt on a decoder needs; this is an encoder-decoder"):
        Predictor(t5, make_prompt("t5"), tiny.tuned(tiny.make_soft_prompt(t5))).prompt_embeddings(ROWS[0])
    with pytest.raises(
        BadInputError, match=r"row 0: prompt too long: 250 virtual \+ \d+ prompt \+ 0 answer tokens = \d+, but the model reads 256"
    ):
        Predictor(bert, make_prompt("bert"), tiny.tuned(tiny.make_soft_prompt(bert, 250)) | HEAD).score_labels(ROWS)
    with pytest.raises(BadInputError, match=r"must hold classifier\.weight and classifier\.bias, got none"):
        Predictor(bert, make_prompt("bert"), tiny.tuned(tiny.make_soft_prompt(bert)))
    with pytest.raises(BadInputError, match=r"must hold no classification head, got \['classifier\.bias', 'classifier\.weight'\]"):
        Predictor(t5, make_prompt("t5"), tiny.tuned(tiny.make_soft_prompt(t5)) | HEAD)
    with pytest.raises(BadInputError, match="row 0: the rendered template is empty; an encoder must read at least one token"):
        check_length(0, EncodedRow([]), 4, 0, bert)
    with pytest.raises(BadInputError, match=r"classifier\.weight must be \[3, 32\] for this base model, got \[2, 32\]"):
        Predictor(bert, make_prompt("bert"), {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(3)})


def test_a_changed_classification_head_is_found(tmp_path):
    base, prompt = tiny.make_base("bert"), make_prompt("bert")
    tensors = tiny.tuned(tiny.make_soft_prompt(base)) | HEAD
    write_release(tmp_path / "release", prompt, tensors, base, {})
    file = tmp_path / "release/classifier/model.safetensors"
    head = load_file(file)
    save_file({"classifier.weight": head["classifier.weight"]}, file)
    with pytest.raises(IntegrityError, match="sha256 must be"):
        read_release(tmp_path / "release")
    tiny.reseal(tmp_path / "release")
    with pytest.raises(IntegrityError, match=r"the classification head must be classifier\.weight, classifier\.bias, got"):
        read_release(tmp_path / "release")


def test_an_encoder_is_loaded_without_the_pooler_that_it_may_lack(tmp_path):
    tiny.save_base(tmp_path / "tiny", "bert")
    assert load_base(tmp_path / "tiny").model.pooler is None
    assert (load_base(tmp_path / "tiny").context, tiny.make_base("roberta").context) == (256, 255)


def test_an_end_that_the_template_writes_is_not_written_twice():
    base = tiny.make_base("bert")
    plain, ended = (
        Encoder(make_prompt("bert", template=template), base.tokenizer, "encoder").prompts([{"text": "late"}])[0]
        for template in ("{text}", f"{tiny.BOS}{{text}}{tiny.EOS}")
    )
    assert plain == ended
    assert (plain[0], plain[-1]) == (2, 1)


def test_batches_count_the_virtual_tokens_that_each_row_brings_along(monkeypatch):
    base = tiny.make_base("bert")
    batches = validation_batches(base, encoded(base, make_prompt("bert")), encoder.run_prefix(base, tiny.make_soft_prompt(base, 200)))
    assert max(sum(batch.sizes) for batch in batches) <= VALIDATION_TOKENS
    assert len(batches) > 4


def test_an_encoders_run_goes_on_from_its_checkpoint_to_the_same_bytes(tmp_path):
    base, prompt = tiny.make_base("bert"), make_prompt("bert")
    whole = tune(base, prompt, tiny.make_rows(32), ROWS)

    def stop_at_seven(row):
        if row["step"] == 7:
            raise KeyboardInterrupt

    place = Checkpoint(tmp_path / "state", 0.0, lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        tune(base, prompt, tiny.make_rows(32), ROWS, stop_at_seven, place)
    resumed = tune(base, prompt, tiny.make_rows(32), ROWS, checkpoint=place)
    assert set(resumed.best) == {"prompt_embeddings", "classifier.weight", "classifier.bias"}
    assert all(torch.equal(whole.best[name], tensor) for name, tensor in resumed.best.items())


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_bf16_weights_are_near_fp32(kind):
    whole, half = tiny.make_base(kind, std=0.1), tiny.make_base(kind, std=0.1, dtype=torch.bfloat16)
    head = HEAD if kind == "bert" else {}
    prompt, tensors = make_prompt(kind), tiny.tuned(tiny.make_soft_prompt(whole)) | head
    exact, rounded = (Predictor(base, prompt, tensors).score_labels(ROWS) for base in (whole, half))
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.1)
    assert tune(half, prompt, tiny.make_rows(16), ROWS).best["prompt_embeddings"].dtype == torch.float32
