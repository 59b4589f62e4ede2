"""Base models and releases that were made to run code, or to fill memory: refused before anything of theirs is loaded."""

import json
import shutil

import pytest
import tiny
from safetensors.torch import save_file

from retune.errors import BadInputError, ConfigError, IntegrityError
from retune.inference.base_model import load_base
from retune.inference.encoding import Encoder
from retune.inference.release import MANIFEST, read_release, write_release
from retune.peft_adapter import read_adapter

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = {kind!r}
class Model(LlamaForCausalLM): pass
class Tokens(PreTrainedTokenizerFast): pass
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_base(folder)
    return folder


@pytest.fixture
def hostile(saved, tmp_path):
    """A copy of a base model whose modeling file writes `marker` when it is run, for a `model_type`."""

    def make(kind="llama", config=None, tokenizer=None):
        folder = shutil.copytree(saved, tmp_path / "model")
        (folder / "modeling_own.py").write_text(CODE.format(marker=str(tmp_path / "marker"), kind=kind))
        classes = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
        edit(folder / "config.json", model_type=kind, auto_map=classes, trust_remote_code=True, **(config or {}))
        edit(folder / "tokenizer_config.json", trust_remote_code=True, **(tokenizer or {}))
        return folder

    return make


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_that_comes_with_a_model_is_not_run_although_its_configuration_asks_for_it(hostile, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    folder = hostile(tokenizer={"auto_map": {"AutoTokenizer": ["modeling_own.Tokens", "modeling_own.Tokens"]}})
    base = load_base(folder)
    assert type(base.model).__module__.startswith("transformers.")
    assert type(base.tokenizer).__module__.startswith("transformers.")
    assert not (tmp_path / "marker").exists()


def test_an_architecture_that_only_its_own_code_knows_is_refused_before_anything_is_loaded(hostile, tmp_path):
    with pytest.raises(
        BadInputError, match=r"architecture must be one of bert.*got 'own'.*code that comes with a model \(auto_map\) is never run"
    ):
        load_base(hostile("own"))
    assert not (tmp_path / "marker").exists()


def test_a_tokenizer_that_only_its_own_code_knows_is_refused(hostile, tmp_path):
    own = {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["modeling_own.Tokens", None]}}
    with pytest.raises(BadInputError, match="tokenizer cannot be loaded without code of its own, which is never run"):
        load_base(hostile(tokenizer=own))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_would_be_fetched_from_the_hub_is_refused(hostile, name):
    with pytest.raises(BadInputError, match="attn_implementation must be eager or sdpa, got 'org/kernel'"):
        load_base(hostile(config={name: "org/kernel"}))


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_weights_that_another_package_would_load_are_refused(hostile, name):
    with pytest.raises(BadInputError, match=f"has {name}: another package would load the weights"):
        load_base(hostile(config={name: {"quant_method": "bitsandbytes", "load_in_4bit": True}}))


def test_an_adapter_in_the_folder_would_be_another_model_and_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/other"}))
    with pytest.raises(BadInputError, match=r"holds an adapter \(adapter_config.json\)"):
        load_base(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": ["llama"]}'])
def test_a_configuration_that_is_none_is_bad_input(saved, tmp_path, content):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(BadInputError, match=r"config\.json|must be one of"):
        load_base(folder)


@pytest.fixture
def release(llama, tmp_path):
    prompt = tiny.make_prompt(tune={"method": "none"})
    write_release(tmp_path / "r", prompt, {}, llama, {})
    return tmp_path / "r"


def test_a_release_is_weighed_before_it_is_read(release, monkeypatch):
    (release / "prompt.yaml").unlink()
    with (release / "prompt.yaml").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no disk, and no memory unless it is read
    with pytest.raises(BadInputError, match=r"takes 1,099,511,627,776 bytes, at most 17,179,869,184 .* set RETUNE_MAX_RELEASE_BYTES"):
        read_release(release)
    monkeypatch.setenv("RETUNE_MAX_RELEASE_BYTES", "a lot")
    with pytest.raises(ConfigError, match="RETUNE_MAX_RELEASE_BYTES must be a whole number of bytes, got 'a lot'"):
        read_release(release)


def test_what_a_user_allows_is_read(release, monkeypatch):
    monkeypatch.setenv("RETUNE_MAX_RELEASE_BYTES", "10")
    with pytest.raises(BadInputError, match="at most 10 are read"):
        read_release(release)
    monkeypatch.setenv("RETUNE_MAX_RELEASE_BYTES", "100000")
    assert read_release(release).tensors == {}


def test_a_giant_manifest_is_not_read(release):
    with (release / MANIFEST).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged: it takes more than 1,048,576 bytes"):
        read_release(release)


def test_an_adapter_larger_than_any_soft_prompt_is_not_read(llama, tmp_path):
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "num_virtual_tokens": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"token_dim": llama.hidden_size}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with (tmp_path / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadInputError, match=r"must take at most .* 1,000 virtual tokens .* got 1,099,511,627,776"):
        read_adapter(tmp_path, llama)


def test_a_rows_text_is_text_whatever_it_looks_like(llama):
    text = "{text.__class__} {label} {0} {{ 7 * 7 }} ${HOME} %(text)s"
    [row] = Encoder(tiny.make_prompt(), llama.tokenizer, llama.family).prompts([{"text": text, "label": "low"}])
    assert llama.tokenizer.decode(row) == f"Ticket: {text}\nPriority:"
