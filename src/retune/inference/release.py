"""The release folder: written once, byte for byte the same for the same inputs, and verified whenever it is read.

    manifest.json                        canonical JSON; its sha256 is the release's id
    prompt.yaml                          the resolved prompt, every default written out
    adapter/adapter_config.json          PEFT's format (0.21.2): `PeftModel.from_pretrained(base, folder / "adapter")` loads it
    adapter/adapter_model.safetensors    what was tuned, fp32; of a soft prompt `prompt_embeddings` [P, H]
    model/model.safetensors              method full, in place of the adapter: the base model's weights that changed, fp32
    classifier/model.safetensors         of an encoder: its classification head, `classifier.weight` [C, H] and `classifier.bias` [C], fp32
    examples/rows.jsonl                  method few_shot, in place of the adapter: training rows (see `examples`)

Method none has none of the four. No file holds a time, a host or an absolute path.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from retune.config import Prompt, Tune, canonical_json, parse_yaml
from retune.errors import BadInputError, ConfigError, IntegrityError
from retune.inference.adapters import EMBEDDINGS, HEAD, MODULE, key_value_heads, tuned_model
from retune.inference.base_model import BaseModel, Family
from retune.inference.examples import example_lines, read_examples

__all__ = ["FORMAT_VERSION", "Release", "read_release", "write_release"]

FORMAT_VERSION = 1
PEFT_VERSION = "0.21.2"
"""Version of PEFT whose adapter format is written. PEFT is not imported: a release is made and served without it."""
MANIFEST, PROMPT = "manifest.json", "prompt.yaml"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
WEIGHTS = "model/model.safetensors"
CLASSIFIER = "classifier/model.safetensors"
EXAMPLES = "examples/rows.jsonl"
VARIABLE = "RETUNE_MAX_RELEASE_BYTES"
MAX_BYTES = 16 << 30
"""What a release may take unless the variable says otherwise: it is read into memory whole."""
MAX_MANIFEST = 1 << 20
NOTHING_TUNED = ("none", "few_shot")
"""Methods whose release holds no tensor."""
TASK_TYPES: dict[Family, str] = {"decoder": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION", "encoder-decoder": "SEQ_2_SEQ_LM"}
"""PEFT's. Its own classification heads read the first token; ours stands beside the adapter."""

Shapes = dict[str, list[int | None]]
"""Tensor name -> shape; None: a side that only the base model knows."""


@dataclass(frozen=True)
class Release:
    id: str
    """sha256 of the manifest's bytes."""
    folder: Path
    prompt: Prompt
    tensors: dict[str, torch.Tensor]
    """What was tuned, by its name in the file, fp32; empty for methods none and few_shot."""
    examples: list[dict[str, str]]
    """Method few_shot: the training rows that examples are chosen from; empty for any other."""
    base_sha256: str
    tokenizer_sha256: str
    inputs: dict[str, str]
    """Hashes of what the tune stage was given."""
    manifest: dict[str, Any]


def write_release(
    folder: Path,
    prompt: Prompt,
    tensors: Mapping[str, torch.Tensor],
    base: BaseModel,
    inputs: Mapping[str, str],
    examples: Sequence[Mapping[str, str]] = (),
) -> str:
    """Writes a release and returns its id. The folder appears whole or not at all.

    folder: must not exist, or hold this very release. tensors: what was tuned; empty for methods none and few_shot. inputs: name -> hash.
    examples: of method few_shot, and of no other, the training rows that it chooses from.

    Raises BadInputError if tensors or examples do not fit the prompt file or the base model, or the folder holds something else.
    """
    if prompt.base_model.sha256 not in (None, base.sha256):
        raise BadInputError(
            f"{prompt.name}: base_model.sha256 must be that of the model used, {base.sha256}, got {prompt.base_model.sha256}"
        )
    files = {PROMPT: _prompt_yaml(prompt)}
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    head = {name: tensors.pop(name) for name in HEAD if name in tensors}
    config = None if prompt.tune.method in (*NOTHING_TUNED, "full") else _adapter_config(prompt, tensors, base)
    if wrong := _wrong(prompt.tune, config, tensors) or _wrong_values(head) or _wrong_examples(prompt, examples):
        raise BadInputError(f"{prompt.name}: tune.method {prompt.tune.method}: {wrong}")
    tuned_model(base, prompt, tensors | head)
    if config is not None:
        files[ADAPTER_CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    if examples:
        files[EXAMPLES] = example_lines(examples)
    if prompt.tune.method not in NOTHING_TUNED:
        files[_weights_file(prompt.tune)] = save(tensors, metadata={"format": "pt"})
    if head:
        files[CLASSIFIER] = save(head, metadata={"format": "pt"})
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
    """Reads a release and verifies every byte of it: manifest, file list, hashes, prompt, tensors.

    release_id: the id that it must have; None: any.

    Raises BadInputError if there is no release or it is too large to be read, IntegrityError if it is not what was written.
    """
    if not (folder / MANIFEST).is_file():
        raise BadInputError(f"{folder} holds no release ({MANIFEST} is missing)")
    if (folder / MANIFEST).stat().st_size > MAX_MANIFEST:
        raise IntegrityError(f"{folder / MANIFEST} is damaged: it takes more than {MAX_MANIFEST:,} bytes")
    raw = (folder / MANIFEST).read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if release_id is not None and found != release_id:
        raise IntegrityError(f"{folder}: the release must be {release_id}, got {found}")
    manifest = _read_manifest(folder, raw)
    contents = _read_files(folder, manifest["files"])
    prompt = _read_prompt(folder, contents[PROMPT])
    expected = {PROMPT, *_files_of(prompt.tune)}
    if set(contents) - {CLASSIFIER} != expected:
        raise IntegrityError(f"{folder}: method {prompt.tune.method} must have the files {sorted(expected)}, got {sorted(contents)}")
    recorded = manifest["base_model"]
    if prompt.base_model.model_dump(exclude={"sha256"}, exclude_none=True) != {
        key: value for key, value in recorded.items() if key not in ("sha256", "tokenizer_sha256")
    } or prompt.base_model.sha256 not in (None, recorded["sha256"]):
        raise IntegrityError(f"{folder}: {MANIFEST} and {PROMPT} name different base models")
    tensors = {} if prompt.tune.method in NOTHING_TUNED else _read_tensors(folder, prompt.tune, contents)
    examples = _read_examples(folder, prompt, contents[EXAMPLES]) if EXAMPLES in contents else []
    hashes = recorded["sha256"], recorded["tokenizer_sha256"]
    return Release(found, folder, prompt, tensors, examples, *hashes, dict(manifest["inputs"]), manifest)


def _prompt_yaml(prompt: Prompt) -> bytes:
    # Not sorted: the order of the labels is that of the probability columns.
    return yaml.safe_dump(prompt.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1000).encode()


def _weights_file(tune: Tune) -> str:
    return WEIGHTS if tune.method == "full" else ADAPTER_WEIGHTS


def _files_of(tune: Tune) -> tuple[str, ...]:
    """What a release holds besides prompt, manifest and an encoder's head."""
    of_method = {"none": (), "few_shot": (EXAMPLES,), "full": (WEIGHTS,)}
    return of_method.get(tune.method, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def _declared(tune: Tune) -> dict[str, Any]:
    """What an adapter's configuration must say because the prompt file does. p_tuning's network ends in a soft prompt like any other."""
    if tune.method == "lora":
        return {"peft_type": "LORA", "r": tune.lora_rank, "lora_alpha": tune.lora_alpha}
    if tune.method == "ia3":
        return {"peft_type": "IA3"}
    kind = "PREFIX_TUNING" if tune.method == "prefix_tuning" else "PROMPT_TUNING"
    return {"peft_type": kind, "num_virtual_tokens": tune.num_virtual_tokens}


def _adapter_config(prompt: Prompt, tensors: Mapping[str, torch.Tensor], base: BaseModel) -> dict[str, Any]:
    """What PEFT 0.21.2 needs to load the tensors; for a soft prompt all that it saves (a test compares the bytes)."""
    config, tune = base.model.config, prompt.tune
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": prompt.base_model.hub or prompt.base_model.path,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        "revision": prompt.base_model.revision,
        "task_type": TASK_TYPES[base.family],
        **_declared(tune),
    }
    if tune.method in ("lora", "ia3"):
        layers = {name: name.removeprefix(MODULE).rsplit(".lora_" if tune.method == "lora" else ".ia3_l", 1)[0] for name in tensors}
        more = {"fan_in_fan_out": config.model_type == "gpt2", "target_modules": sorted(set(layers.values()))}
        if tune.method == "ia3":
            more["feedforward_modules"] = sorted(layers[name] for name, tensor in tensors.items() if tensor.shape[0] == 1)
        return common | more
    common |= {"modules_to_save": None, "num_layers": config.num_hidden_layers, "num_transformer_submodules": 1}
    if tune.method == "prefix_tuning":
        groups, size = key_value_heads(base)
        width = groups * size
        return common | {"num_attention_heads": groups, "token_dim": width, "encoder_hidden_size": width, "prefix_projection": False}
    return common | {
        "num_attention_heads": config.num_attention_heads,
        # How it started is in prompt.yaml. TEXT here would make PEFT look for a tokenizer when it loads the tensor.
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "token_dim": base.hidden_size,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def _shapes(config: Mapping[str, Any]) -> Shapes:
    """What an adapter with this configuration holds. Raises KeyError or TypeError for one that says too little."""
    if config["peft_type"] == "LORA":
        a: Shapes = {f"{MODULE}{layer}.lora_A.weight": [config["r"], None] for layer in config["target_modules"]}
        return a | {f"{MODULE}{layer}.lora_B.weight": [None, config["r"]] for layer in config["target_modules"]}
    if config["peft_type"] == "IA3":
        inner = set(config["feedforward_modules"])
        return {f"{MODULE}{layer}.ia3_l": [1, None] if layer in inner else [None, 1] for layer in config["target_modules"]}
    width = config["token_dim"] * (2 * config["num_layers"] if config["peft_type"] == "PREFIX_TUNING" else 1)
    return {EMBEDDINGS: [config["num_virtual_tokens"], width]}


def _wrong(tune: Tune, config: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with the tensors of a release, if anything. config: the adapter's; None for a method without an adapter."""
    if config is not None:
        shapes = _shapes(config)
        if set(tensors) != set(shapes) or not shapes:
            return f"must hold {', '.join(sorted(shapes)) or 'tensors'} alone, got {sorted(tensors)}"
        for name, shape in shapes.items():
            found = list(tensors[name].shape)
            if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
                return f"{name} must be {shape}, got {found}"
    elif tune.method in NOTHING_TUNED and tensors:
        return f"must hold no tensor, got {sorted(tensors)}"
    return _wrong_values(tensors)


def _wrong_examples(prompt: Prompt, examples: Sequence[Mapping[str, str]]) -> str | None:
    if bool(examples) != (prompt.tune.method == "few_shot"):
        return f"must hold {'training rows, got none' if not examples else f'no training row, got {len(examples)}'}"
    try:
        if examples:
            read_examples(prompt, example_lines(examples))
    except ValueError as error:
        return f"the training rows cannot be read back: {error}"
    return None


def _wrong_values(tensors: Mapping[str, torch.Tensor]) -> str | None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            return f"{name} must be of torch.float32, got {list(tensor.shape)} of {tensor.dtype}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} holds values that are not finite; lower tune.learning_rate"
    return None


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
    for name in hashes:
        if not (folder / name).is_file():
            raise IntegrityError(f"{folder / name} is not a plain file")
    size, most = sum((folder / name).stat().st_size for name in hashes), _most_bytes()
    if size > most:
        raise BadInputError(
            f"{folder}: the release takes {size:,} bytes, at most {most:,} are read into memory; set {VARIABLE} to allow it"
        )
    contents = {}
    for name, expected in sorted(hashes.items()):
        path = folder / name
        contents[name] = path.read_bytes()
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            raise IntegrityError(f"{path}: sha256 must be {expected}, got {found}")
    return contents


def _most_bytes(environ: Mapping[str, str] = os.environ) -> int:
    value = environ.get(VARIABLE) or str(MAX_BYTES)
    if not value.isdigit():
        raise ConfigError(f"{VARIABLE} must be a whole number of bytes, got {value!r}")
    return int(value)


def _read_prompt(folder: Path, raw: bytes) -> Prompt:
    try:
        return Prompt.model_validate(parse_yaml(raw, PROMPT))
    except (ValidationError, ConfigError) as error:
        raise IntegrityError(f"{folder / PROMPT} is not a resolved prompt: {error}") from None


def _read_tensors(folder: Path, tune: Tune, contents: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """fp32, finite, and of the names and shapes that the prompt file and the adapter's configuration ask for."""
    file = folder / _weights_file(tune)
    config = None
    try:
        if tune.method != "full":
            config = json.loads(contents[ADAPTER_CONFIG])
            for name, value in _declared(tune).items():
                if config[name] != value:
                    raise IntegrityError(f"{folder / ADAPTER_CONFIG}: {name} must be {value} for method {tune.method}, got {config[name]}")
        tensors: dict[str, torch.Tensor] = load(contents[_weights_file(tune)])
        head: dict[str, torch.Tensor] = load(contents[CLASSIFIER]) if CLASSIFIER in contents else {}
        wrong = _wrong(tune, config, tensors) or _wrong_values(head)
        if head and tuple(sorted(head)) != tuple(sorted(HEAD)):
            wrong = f"the classification head must be {', '.join(HEAD)}, got {sorted(head)}"
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise IntegrityError(f"{file.parent} does not hold what method {tune.method} releases: {error!r}") from None
    if wrong:
        raise IntegrityError(f"{file}: {wrong}")
    return tensors | head


def _read_examples(folder: Path, prompt: Prompt, content: bytes) -> list[dict[str, str]]:
    try:
        return read_examples(prompt, content)
    except ValueError as error:
        raise IntegrityError(f"{folder / EXAMPLES} does not hold what method few_shot releases: {error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
