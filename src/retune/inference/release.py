"""The release folder: written once, byte for byte the same for the same inputs, and verified whenever it is read.

    manifest.json                        canonical JSON; its sha256 is the release's id
    prompt.yaml                          the resolved prompt, every default written out
    adapter/adapter_config.json          PEFT's format (0.21.2): `PeftModel.from_pretrained(base, folder / "adapter")` loads it
    adapter/adapter_model.safetensors    `prompt_embeddings` [P, H], fp32

Method none has no adapter. No file holds a time, a host or an absolute path.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from retune.config import BaseModelRef, Prompt, canonical_json
from retune.errors import BadInputError, IntegrityError
from retune.inference.base_model import BaseModel

__all__ = ["FORMAT_VERSION", "Release", "read_release", "write_release"]

FORMAT_VERSION = 1
PEFT_VERSION = "0.21.2"
"""Version of PEFT whose adapter format is written. PEFT is not imported: a release is made and served without it."""
MANIFEST, PROMPT = "manifest.json", "prompt.yaml"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class Release:
    id: str
    """sha256 of the manifest's bytes."""
    folder: Path
    prompt: Prompt
    soft_prompt: torch.Tensor | None
    """[P, H], fp32; None for method none."""
    base_sha256: str
    tokenizer_sha256: str
    inputs: dict[str, str]
    """Hashes of what the tune stage was given."""
    manifest: dict[str, Any]


def write_release(folder: Path, prompt: Prompt, soft_prompt: torch.Tensor | None, base: BaseModel, inputs: Mapping[str, str]) -> str:
    """Writes a release and returns its id. The folder appears whole or not at all.

    folder: must not exist, or hold this very release. soft_prompt: [P, H]; None for method none. inputs: name -> hash.

    Raises BadInputError if the soft prompt does not fit the prompt file or the base model, or the folder holds something else.
    """
    _check_soft_prompt(prompt, soft_prompt, base)
    files = {PROMPT: _prompt_yaml(prompt)}
    if soft_prompt is not None:
        files[ADAPTER_CONFIG] = _adapter_config(prompt.base_model, soft_prompt, base)
        tensor = soft_prompt.detach().to("cpu", torch.float32).contiguous()
        files[ADAPTER_WEIGHTS] = save({TENSOR: tensor}, metadata={"format": "pt"})
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "base_model": {
            **prompt.base_model.model_dump(mode="json", exclude_none=True),
            "sha256": base.sha256,
            "tokenizer_sha256": base.tokenizer_sha256,
        },
        "inputs": dict(inputs),
    }
    files[MANIFEST] = canonical_json(manifest)
    release_id = hashlib.sha256(files[MANIFEST]).hexdigest()
    if folder.exists():
        return _existing(folder, release_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return release_id


def read_release(folder: Path, release_id: str | None = None) -> Release:
    """Reads a release and verifies every byte of it: manifest, file list, hashes, prompt, tensor.

    release_id: the id that it must have; None: any.

    Raises BadInputError if there is no release, IntegrityError if it is not what was written.
    """
    if not (folder / MANIFEST).is_file():
        raise BadInputError(f"{folder} holds no release ({MANIFEST} is missing)")
    raw = (folder / MANIFEST).read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if release_id is not None and found != release_id:
        raise IntegrityError(f"{folder}: the release must be {release_id}, got {found}")
    manifest = _read_manifest(folder, raw)
    contents = _read_files(folder, manifest["files"])
    prompt = _read_prompt(folder, contents[PROMPT])
    expected = {PROMPT} if prompt.tune.method == "none" else {PROMPT, ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    if set(contents) != expected:
        raise IntegrityError(f"{folder}: method {prompt.tune.method} must have the files {sorted(expected)}, got {sorted(contents)}")
    recorded = manifest["base_model"]
    if prompt.base_model.model_dump(exclude={"sha256"}, exclude_none=True) != {
        key: value for key, value in recorded.items() if key not in ("sha256", "tokenizer_sha256")
    } or prompt.base_model.sha256 not in (None, recorded["sha256"]):
        raise IntegrityError(f"{folder}: {MANIFEST} and {PROMPT} name different base models")
    soft_prompt = _read_tensor(folder, prompt, contents) if ADAPTER_WEIGHTS in contents else None
    return Release(found, folder, prompt, soft_prompt, recorded["sha256"], recorded["tokenizer_sha256"], dict(manifest["inputs"]), manifest)


def _check_soft_prompt(prompt: Prompt, soft_prompt: torch.Tensor | None, base: BaseModel) -> None:
    if prompt.base_model.sha256 not in (None, base.sha256):
        raise BadInputError(
            f"{prompt.name}: base_model.sha256 must be that of the model used, {base.sha256}, got {prompt.base_model.sha256}"
        )
    if (prompt.tune.method == "none") != (soft_prompt is None):
        raise BadInputError(f"{prompt.name}: tune.method {prompt.tune.method} with {'no' if soft_prompt is None else 'a'} soft prompt")
    if soft_prompt is None:
        return
    expected = [prompt.tune.num_virtual_tokens, base.hidden_size]
    if list(soft_prompt.shape) != expected:
        raise BadInputError(f"{prompt.name}: the soft prompt must be [P, H] = {expected}, got {list(soft_prompt.shape)}")
    if not bool(torch.isfinite(soft_prompt).all()):
        raise BadInputError(f"{prompt.name}: the soft prompt holds values that are not finite; lower tune.learning_rate")


def _prompt_yaml(prompt: Prompt) -> bytes:
    # Not sorted: the order of the labels is that of the probability columns.
    return yaml.safe_dump(prompt.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1000).encode()


def _adapter_config(ref: BaseModelRef, soft_prompt: torch.Tensor, base: BaseModel) -> bytes:
    """What PEFT 0.21.2 saves for a PromptTuningConfig (a test compares the bytes)."""
    config = base.model.config
    return json.dumps(
        {
            "auto_mapping": None,
            "base_model_name_or_path": ref.hub or ref.path,
            "inference_mode": True,
            "modules_to_save": None,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": soft_prompt.shape[0],
            "peft_type": "PROMPT_TUNING",
            "peft_version": PEFT_VERSION,
            # How it started is in prompt.yaml. TEXT here would make PEFT look for a tokenizer when it loads the tensor.
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "revision": ref.revision,
            "task_type": "CAUSAL_LM",
            "token_dim": soft_prompt.shape[1],
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        },
        indent=2,
        sort_keys=True,
    ).encode()


def _existing(folder: Path, release_id: str) -> str:
    try:
        read_release(folder, release_id)
    except (BadInputError, IntegrityError) as error:
        raise BadInputError(f"{folder} exists and is not the release {release_id}; remove it first ({error})") from None
    return release_id


def _read_manifest(folder: Path, raw: bytes) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(raw)
        if manifest["format_version"] != FORMAT_VERSION:
            raise BadInputError(
                f"{folder}: format_version must be {FORMAT_VERSION}, got {manifest['format_version']!r}; use a newer Retune"
            )
        texts = [*manifest["files"].values(), *manifest["inputs"].values(), *manifest["base_model"].values()]
        if canonical_json(manifest) != raw or not all(isinstance(x, str) for x in texts):
            raise ValueError("not canonical")
        if not {"sha256", "tokenizer_sha256"} <= manifest["base_model"].keys():
            raise ValueError("base_model lacks a hash")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder / MANIFEST} is damaged: {error!r}") from None
    return manifest


def _read_files(folder: Path, hashes: Mapping[str, str]) -> dict[str, bytes]:
    """Contents of all files but the manifest, each verified; the folder holds these and no others."""
    # os.walk does not follow links to folders: such a link counts as a file of its own, and is refused as one.
    present = {
        (Path(root) / name).relative_to(folder).as_posix()
        for root, folders, names in os.walk(folder)
        for name in [*names, *(f for f in folders if (Path(root) / f).is_symlink())]
    } - {MANIFEST}
    missing, extra = sorted(set(hashes) - present), sorted(present - set(hashes))
    if missing or extra or PROMPT not in hashes:
        raise IntegrityError(f"{folder}: files missing: {', '.join(missing) or 'none'}; files too many: {', '.join(extra) or 'none'}")
    contents = {}
    for name, expected in sorted(hashes.items()):
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is not a plain file")
        contents[name] = path.read_bytes()
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            raise IntegrityError(f"{path}: sha256 must be {expected}, got {found}")
    return contents


def _read_prompt(folder: Path, raw: bytes) -> Prompt:
    try:
        return Prompt.model_validate(yaml.safe_load(raw))
    except (ValidationError, yaml.YAMLError) as error:
        raise IntegrityError(f"{folder / PROMPT} is not a resolved prompt: {error}") from None


def _read_tensor(folder: Path, prompt: Prompt, contents: Mapping[str, bytes]) -> torch.Tensor:
    """Returns [P, H], fp32, finite."""
    try:
        config = json.loads(contents[ADAPTER_CONFIG])
        tensors = load(contents[ADAPTER_WEIGHTS])
        declared = [config["num_virtual_tokens"], config["token_dim"]]
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise IntegrityError(f"{folder / 'adapter'} is not a PEFT prompt-tuning adapter: {error!r}") from None
    if kind != "PROMPT_TUNING" or declared[0] != prompt.tune.num_virtual_tokens:
        raise IntegrityError(
            f"{folder / ADAPTER_CONFIG}: must be PROMPT_TUNING, {prompt.tune.num_virtual_tokens} tokens, got {kind}, {declared[0]}"
        )
    if set(tensors) != {TENSOR}:
        raise IntegrityError(f"{folder / ADAPTER_WEIGHTS}: must hold {TENSOR} alone, got {sorted(tensors)}")
    tensor = tensors[TENSOR]
    if list(tensor.shape) != declared or tensor.dtype != torch.float32:
        raise IntegrityError(f"{TENSOR} must be {declared} of torch.float32, got {list(tensor.shape)} of {tensor.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise IntegrityError(f"{TENSOR} holds values that are not finite")
    return tensor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
