"""Every method against PEFT's own code, and from the prompt file to a release at work."""

import copy
import json

import pandas as pd
import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model

from retune.config import Tune
from retune.errors import BadInputError, IntegrityError
from retune.inference.adapters import tuned_model
from retune.inference.decoder import answer_losses, logits_at, run_packed
from retune.inference.inputs import EncodedRow, pack
from retune.inference.predictor import Predictor
from retune.inference.release import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS, read_release, write_release
from retune.prompt_tuning import METHODS, tune
from retune.prompt_tuning.checkpoints import Checkpoint

ROWS = [EncodedRow([10, 11, 12, 13, 14, 15], [40, 1]), EncodedRow([30, 31], [41, 42, 1]), EncodedRow([50, 51, 52], [1])]
TRAIN, VALIDATION = tiny.make_rows(48, 0), tiny.make_rows(24, 1)
SETTINGS = {"num_virtual_tokens": 4, "epochs": 4, "batch_size": 8, "validate_every": 6, "lora_rank": 4, "encoder_hidden_size": 48}
WITH_PEFT = ["p_tuning", "prefix_tuning", "lora", "ia3"]
ALL = ["prompt_tuning", *WITH_PEFT, "full"]
RATES = {"prompt_tuning": 0.05, "p_tuning": 0.01, "prefix_tuning": 0.2, "lora": 0.02, "ia3": 0.1, "full": 0.003}
"""Higher than the defaults: a few steps on a random model must show."""


def kind_of(base):
    return base.model.config.model_type


def shaken(tuned):
    """The parameters off their start, where LoRA is 0 and (IA)3 is 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return tuned


def reference(base, method, parameters):
    """PEFT's model with the same parameters, and its own of each of ours, by our names."""
    model = tiny.make_model(kind_of(base), len(base.tokenizer), std=0.1)
    if method == "full":
        theirs = model.requires_grad_(True)
        own = dict(theirs.named_parameters())
    else:
        config = {
            "p_tuning": lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=48, task_type="CAUSAL_LM"),
            "prefix_tuning": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
            "lora": lambda: LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM"),
            "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
        }[method]()
        theirs = get_peft_model(model, config).eval()
        start = "base_model.model." if method in ("lora", "ia3") else "prompt_encoder.default."
        own = {name.removeprefix(start): p for name, p in theirs.named_parameters() if p.requires_grad}
        own = {"prompt_embeddings" if method == "prefix_tuning" else name: p for name, p in own.items()}
    assert own.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            own[name].copy_(parameter)
    return theirs, own


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", [*WITH_PEFT, "full"])
def test_loss_and_gradients_are_pefts(kind, method):
    """All rows in one packed run against PEFT's right-padded batch."""
    base = tiny.make_base(kind, std=0.1)
    tuned = shaken(METHODS[method](base, Tune(method=method, **SETTINGS)))
    theirs, own = reference(base, method, tuned.parameters)
    batch = tiny.padded(ROWS, "right")
    expected = theirs(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
    expected.backward()
    loss = answer_losses(tuned.base, tuned.prefix(), pack(ROWS, tuned.size)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in tuned.parameters.items():
        if name.endswith("k_proj.bias"):  # the same for all keys: softmax does not see it, its gradient is rounding
            continue
        assert ((parameter.grad - own[name].grad).norm() / own[name].grad.norm()).item() < 1e-5, name


@pytest.mark.parametrize("method", ALL)
def test_from_the_prompt_file_to_a_release_at_work(base, method, tmp_path):
    """Tuning lowers the loss, repeats byte for byte, leaves the base model as it was, and what is released predicts just so."""
    before = copy.deepcopy(base.model.state_dict())
    prompt = tiny.make_prompt(tune=SETTINGS | {"method": method, "learning_rate": RATES[method]})
    results = [tune(base, prompt, TRAIN, VALIDATION) for _ in range(2)]
    ids = [write_release(tmp_path / str(i), prompt, result.best, base, {}) for i, result in enumerate(results)]
    assert ids[0] == ids[1]
    assert results[0].best_validation_loss < 0.9 * results[0].initial_validation_loss
    release = read_release(tmp_path / "0", ids[0])
    assert release.tensors.keys() == results[0].best.keys()
    assert all(torch.equal(tensor, results[0].best[name]) for name, tensor in release.tensors.items())
    predictor = Predictor.of(release, base)
    assert predictor.perplexity(VALIDATION) == pytest.approx(torch.tensor(results[0].best_validation_loss).exp().item(), rel=1e-4)
    whole, single = predictor.predict(VALIDATION), pd.concat([predictor.predict([row]) for row in VALIDATION], ignore_index=True)
    pd.testing.assert_frame_equal(whole, single, atol=1e-5)
    assert base.model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in base.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


@pytest.mark.parametrize("method", ALL)
def test_generation_in_a_batch_is_that_of_each_row(llama, method):
    prompt = tiny.make_summary_prompt(tune=SETTINGS | {"method": method, "epochs": 1, "learning_rate": RATES[method]})
    model = Predictor(llama, prompt, tune(llama, prompt, TRAIN, VALIDATION).best)
    assert model.generate(VALIDATION) == [model.generate([row])[0] for row in VALIDATION]
    assert model.generate(VALIDATION) != Predictor(llama, prompt, {}).generate(VALIDATION)


@pytest.mark.parametrize("method", WITH_PEFT)
def test_peft_loads_the_adapter_of_a_release_and_computes_the_same(base, method, tmp_path):
    settings = Tune(method=method, **SETTINGS)
    prompt = tiny.make_prompt(tune=settings.model_dump())
    tuned = shaken(METHODS[method](base, settings))
    tensors = tuned.released({name: parameter.detach() for name, parameter in tuned.parameters.items()})
    write_release(tmp_path / "release", prompt, tensors, base, {})
    theirs = PeftModel.from_pretrained(tiny.make_model(kind_of(base), len(base.tokenizer)), tmp_path / "release/adapter").eval()
    model, prefix = tuned_model(base, prompt, read_release(tmp_path / "release").tensors)
    batch, packed = tiny.padded(ROWS, "right"), pack(ROWS, tuned.size)
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids, attention_mask=batch.mask).logits
        expected = expected[:, expected.shape[1] - batch.ids.shape[1] :]
        found = logits_at(model, run_packed(model, prefix, packed))
    in_order = torch.cat([expected[i, : len(ROWS[i].read)] for i in packed.order])
    torch.testing.assert_close(found, in_order, rtol=0, atol=1e-4)


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ALL)
def test_a_run_that_goes_on_from_a_checkpoint_releases_the_same_bytes(llama, tmp_path, method):
    prompt = tiny.make_prompt(tune=SETTINGS | {"method": method, "epochs": 2})

    def die(row):
        if row["step"] == 7:
            raise Killed

    whole, checkpoint = tune(llama, prompt, TRAIN, VALIDATION), Checkpoint(tmp_path / "checkpoint", 0)
    with pytest.raises(Killed):
        tune(llama, prompt, TRAIN, VALIDATION, die, checkpoint)
    again = tune(llama, prompt, TRAIN, VALIDATION, checkpoint=checkpoint)
    assert again.curve == whole.curve
    ids = [write_release(tmp_path / name, prompt, result.best, llama, {}) for name, result in (("a", whole), ("b", again))]
    assert ids[0] == ids[1]


def test_a_prefix_starts_as_the_soft_prompt_does(base):
    prompts = [tiny.make_prompt(tune=SETTINGS | {"method": method, "epochs": 1}) for method in ("prompt_tuning", "prefix_tuning")]
    one, two = (tune(base, prompt, TRAIN[:8], VALIDATION).initial_validation_loss for prompt in prompts)
    assert one == pytest.approx(two, rel=1e-6)


def test_an_empty_prompt_after_a_prefix_is_refused_and_after_a_soft_prompt_is_not(llama):
    for method in ("prompt_tuning", "prefix_tuning"):
        settings = Tune(method=method, **SETTINGS)
        tuned = METHODS[method](llama, settings)
        rows = pack([EncodedRow([], [40, 1])], tuned.size)
        if method == "prompt_tuning":
            assert torch.isfinite(answer_losses(llama, tuned.prefix(), rows)).all()
            continue
        with pytest.raises(BadInputError, match=r"with tune\.method prefix_tuning it must"):
            answer_losses(llama, tuned.prefix(), rows)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_target_modules_may_be_chosen(base, method):
    name = "mlp.c_fc" if kind_of(base) == "gpt2" else "up_proj"
    tuned = METHODS[method](base, Tune(method=method, target_modules=(name,)))
    assert len(tuned.parameters) == (4 if method == "lora" else 2)  # of 2 layers
    assert all(f".{name}." in parameter for parameter in tuned.parameters)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_target_modules_that_the_model_lacks_are_named_with_those_it_has(llama, method):
    with pytest.raises(BadInputError, match=r"must name linear layers of the base model, got query; it has down_proj, .*q_proj"):
        METHODS[method](llama, Tune(method=method, target_modules=("q_proj", "query")))
    with pytest.raises(BadInputError, match="got lm_head"):
        METHODS[method](llama, Tune(method=method, target_modules=("lm_head",)))
    with pytest.raises(BadInputError, match=r"tune\.target_modules must be given for a base model of type olmo2"):
        METHODS[method](tiny.make_base("olmo2"), Tune(method=method))


def test_all_weights_release_only_those_that_changed_and_ties_hold():
    base = tiny.make_base("gpt2")
    tuned = METHODS["full"](base, Tune(method="full"))
    assert tuned.base.model.lm_head.weight is tuned.base.model.transformer.wte.weight
    values = {name: parameter.detach().clone() for name, parameter in tuned.parameters.items()}
    values["transformer.wte.weight"] += 1
    assert list(tuned.released(values)) == ["transformer.wte.weight"]
    model, _ = tuned_model(base, tiny.make_prompt(tune={"method": "full"}), tuned.released(values))
    assert model.model.lm_head.weight is model.model.transformer.wte.weight
    assert torch.equal(model.model.lm_head.weight, base.model.lm_head.weight + 1)
    assert model.model.transformer.ln_f.weight is base.model.transformer.ln_f.weight


@pytest.mark.parametrize("method", ALL)
def test_a_release_of_every_method_holds_its_own_files(llama, method, tmp_path):
    prompt = tiny.make_prompt(tune=SETTINGS | {"method": method, "epochs": 1})
    write_release(tmp_path / "r", prompt, tune(llama, prompt, TRAIN, VALIDATION).best, llama, {})
    files = {p.relative_to(tmp_path / "r").as_posix() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert files - {"manifest.json", "prompt.yaml"} == ({WEIGHTS} if method == "full" else {ADAPTER_CONFIG, ADAPTER_WEIGHTS})


def tensors_of(llama, method):
    tuned = METHODS[method](llama, Tune(method=method, **SETTINGS))
    return tuned.released({name: parameter.detach().clone() + 1 for name, parameter in tuned.parameters.items()})


@pytest.mark.parametrize(
    ("method", "damage", "message"),
    [
        ("lora", lambda t: t.pop(next(iter(t))), "must hold base_model.model.model.layers.0"),
        (
            "lora",
            lambda t: t.update({n: x[:3] for n, x in t.items() if "lora_A" in n}),
            r"must be \[4, None\], got \[3, 32\]",
        ),
        ("lora", lambda t: t.update({n: x[:, :31] for n, x in t.items() if "lora_A" in n}), r"must be \[32, 32\] for this base model, got"),
        (
            "lora",
            lambda t: t.update({n.replace("layers.1", "layers.9"): t.pop(n) for n in list(t)}),
            "the base model has no",
        ),
        (
            "ia3",
            lambda t: t.update({n: x[:5] for n, x in t.items() if "v_proj" in n}),
            r"must be \[16, 1\] for this .* got \[5, 1\]",
        ),
        ("ia3", lambda t: t.clear(), "must hold tensors alone, got"),
        ("prefix_tuning", lambda t: t.update({n: x[:, :-2] for n, x in t.items()}), r"must be \[4, 64\], got \[4, 62\]"),
        ("full", lambda t: t.update(head=torch.ones(2)), "the base model has no head"),
        (
            "full",
            lambda t: t.update({"model.norm.weight": torch.ones(2)}),
            r"norm.weight must be \[32\] for this .* got \[2\]",
        ),
        ("full", lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.weight holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_not_written(llama, tmp_path, method, damage, message):
    tensors = tensors_of(llama, method)
    damage(tensors)
    with pytest.raises(BadInputError, match=message):
        write_release(tmp_path / "r", tiny.make_prompt(tune=SETTINGS | {"method": method}), tensors, llama, {})
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("method", "key", "value", "message"),
    [
        ("lora", "r", 8, "r must be 4 for method lora, got 8"),
        ("lora", "lora_alpha", 1, "lora_alpha must be 16"),
        ("lora", "target_modules", ["model.layers.0.self_attn.q_proj"], "must hold base_model.model.model.layers.0"),
        ("lora", "peft_type", "IA3", "peft_type must be LORA"),
        ("ia3", "feedforward_modules", [], r"down_proj.ia3_l must be \[None, 1\], got \[1, 64\]"),
        ("prefix_tuning", "num_layers", 3, r"must be \[4, 96\], got \[4, 64\]"),
    ],
)
def test_an_adapter_that_does_not_agree_with_the_prompt_file_is_refused(llama, tmp_path, method, key, value, message):
    write_release(tmp_path / "r", tiny.make_prompt(tune=SETTINGS | {"method": method}), tensors_of(llama, method), llama, {})
    file = tmp_path / "r" / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    tiny.reseal(tmp_path / "r")
    with pytest.raises(IntegrityError, match=message):
        read_release(tmp_path / "r")


@pytest.mark.parametrize("method", ["prefix_tuning", "lora", "ia3", "full"])
def test_embeddings_are_all_that_another_server_needs_for_a_soft_prompt_only(llama, method):
    model = Predictor(llama, tiny.make_prompt(tune=SETTINGS | {"method": method}), tensors_of(llama, method))
    assert model.soft_prompt is None
    with pytest.raises(BadInputError, match=f"a soft prompt on a decoder needs; this is tune.method {method}"):
        model.prompt_embeddings(TRAIN[0])


@pytest.mark.parametrize("method", [method for method in ALL if method != "full"])
def test_a_bf16_model_is_tuned_with_fp32_parameters(method, tmp_path):
    base = tiny.make_base("llama", dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in METHODS[method](base, Tune(method=method)).parameters.values())
    prompt = tiny.make_prompt(tune=SETTINGS | {"method": method, "learning_rate": RATES[method], "precision": "bf16"})
    result = tune(base, prompt, TRAIN, VALIDATION)
    assert result.best_validation_loss < 0.9 * result.initial_validation_loss
    write_release(tmp_path / "r", prompt, result.best, base, {})
    served = Predictor.of(read_release(tmp_path / "r"), tiny.make_base("llama"))
    assert torch.tensor(served.perplexity(VALIDATION)).log().item() == pytest.approx(result.best_validation_loss, rel=0.1)
