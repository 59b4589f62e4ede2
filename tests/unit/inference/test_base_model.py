import hashlib
import json
import os
import shutil

import pytest
import tiny
import torch

from retune.errors import BadInputError, ConfigError
from retune.inference.base_model import (
    base_sha256,
    find_base_model,
    folder_sha256,
    load_base,
    open_base_model,
    set_threads,
    tokenizer_sha256,
)
from retune.policy import BaseModelRef


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A project with a tiny model in models/tiny, and its reference."""
    project = tmp_path_factory.mktemp("project")
    base = tiny.save_base(project / "models/tiny")
    return project, BaseModelRef(path="models/tiny", sha256=base.sha256)


def test_folder_hash_is_that_of_the_canonical_json_of_file_hashes(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "sub/a.txt").write_bytes(b"one")
    one, two = hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"two").hexdigest()
    expected = hashlib.sha256(f'{{"b.txt":"{two}","sub/a.txt":"{one}"}}'.encode()).hexdigest()
    assert folder_sha256(tmp_path) == expected


def test_readme_and_hidden_files_times_and_modes_do_not_count(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = folder_sha256(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".gitattributes").write_text("words")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x").write_text("words")
    os.utime(tmp_path / "config.json", (0, 0))
    (tmp_path / "config.json").chmod(0o600)
    assert folder_sha256(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert folder_sha256(tmp_path) != before


def test_a_missing_or_empty_folder_has_no_hash(tmp_path):
    with pytest.raises(BadInputError, match="no base model folder"):
        folder_sha256(tmp_path / "none")
    with pytest.raises(BadInputError, match="holds no files"):
        folder_sha256(tmp_path)


def test_a_local_model_is_found_at_its_path_in_the_project(saved):
    project, ref = saved
    assert find_base_model(ref, project) == project / "models/tiny"


def test_a_local_model_is_found_by_hash_in_a_folder_or_below_one(saved, tmp_path):
    project, ref = saved
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    shutil.copytree(project / "models/tiny", tmp_path / "renamed")
    assert find_base_model(ref, None, [tmp_path / "nowhere", tmp_path]) == tmp_path / "renamed"
    assert find_base_model(ref, tmp_path, [tmp_path / "renamed"]) == tmp_path / "renamed"


def test_a_model_with_another_hash_is_not_used_and_the_error_says_what_to_set(saved, tmp_path):
    project, ref = saved
    shutil.copytree(project / "models/tiny", tmp_path / "models/tiny")
    (tmp_path / "models/tiny/config.json").write_text("{}")
    found = folder_sha256(tmp_path / "models/tiny")
    with pytest.raises(BadInputError, match=f"no base model with sha256 {ref.sha256}.*has {found}.*RETUNE_BASE_MODELS"):
        find_base_model(ref, tmp_path)
    with pytest.raises(BadInputError, match="looked in no folder"):
        find_base_model(ref)


def hub_cache(folder, source, revision="a" * 40):
    """The layout of a Hugging Face cache with one snapshot, files linked to blobs."""
    repository = folder / "models--acme--tiny"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
    return snapshot


def test_a_hub_model_is_found_by_revision_in_a_cache_folder(saved, tmp_path):
    project, _ = saved
    snapshot = hub_cache(tmp_path, project / "models/tiny")
    ref = BaseModelRef(hub="acme/tiny", revision="a" * 40)
    assert find_base_model(ref, None, [tmp_path / "empty", tmp_path]) == snapshot
    base = open_base_model(ref, None, [tmp_path])
    assert base.sha256 == base_sha256(snapshot, ref)
    (snapshot / "onnx").mkdir()
    (snapshot / "onnx/config.json").write_text("{}")
    (snapshot / "notes.txt").write_text("a cache may hold more or less than another")
    assert base_sha256(snapshot, ref) == base.sha256


def test_a_hub_model_in_no_cache_is_named_with_the_ways_out(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def away(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    with pytest.raises(BadInputError, match=f"acme/tiny at revision {'b' * 40}.*hf download.*RETUNE_BASE_MODELS.*HF_HUB_OFFLINE"):
        find_base_model(BaseModelRef(hub="acme/tiny", revision="b" * 40), None, [tmp_path])


def test_a_loaded_model_is_frozen_and_in_full_precision(tmp_path):
    base = tiny.save_base(tmp_path, dtype=torch.bfloat16)
    assert not base.model.training
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.model.parameters())
    assert (base.hidden_size, base.context, base.eos_id, base.stop_ids) == (32, 256, 1, {1})


def test_tokenizer_hash_covers_the_files_that_decide_the_tokens(saved, tmp_path):
    folder = shutil.copytree(saved[0] / "models/tiny", tmp_path / "copy")
    before = tokenizer_sha256(folder)
    (folder / "generation_config.json").write_text("{}")
    assert tokenizer_sha256(folder) == before
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert tokenizer_sha256(folder) != before


def test_unknown_architectures_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved[0] / "models/tiny", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(BadInputError, match=r"architecture must be one of bert, gemma.*got 'gemma2'"):
        load_base(folder)


def test_pickled_weights_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved[0] / "models/tiny", tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInputError, match=r"no \*\.safetensors"):
        load_base(folder)


def test_missing_weights_are_refused_rather_than_drawn_at_random(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved[0] / "models/tiny", tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match=r"the weights lack model.layers.1.mlp.up_proj.weight"):
        load_base(folder)


def test_threads_come_from_the_environment():
    set_threads({"RETUNE_THREADS": "2"})
    assert torch.get_num_threads() == 2
    set_threads({})
    assert torch.get_num_threads() == 2
    set_threads({"RETUNE_THREADS": "1"})
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
def test_a_wrong_number_of_threads_is_named(value):
    with pytest.raises(ConfigError, match=f"RETUNE_THREADS must be a whole number >= 1, got '{value}'"):
        set_threads({"RETUNE_THREADS": value})
