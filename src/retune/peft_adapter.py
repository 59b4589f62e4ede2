"""A prompt-tuning adapter that PEFT made, as a soft prompt for this code: `Predictor(base, prompt, read_adapter(folder, base))`."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from retune.errors import BadInputError
from retune.inference.base_model import BaseModel

__all__ = ["read_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = "prompt_embeddings"
EXPECTED = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_transformer_submodules": 1}
MAX_TOKENS = 1_000
"""Virtual tokens, as in a prompt file."""
MAX_HEADER = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_adapter(folder: Path, base: BaseModel) -> dict[str, torch.Tensor]:
    """The soft prompt, `prompt_embeddings` [P, H], of the folder that PEFT's `save_pretrained` wrote, fp32 on the base model's device.

    An adapter names its base model, but holds no hash of it: that the model is the right one is the caller's word. Retune's own releases
    hold an adapter of this kind (`adapter/`), with hashes: `retune.inference.release.read_release` reads those.

    Raises BadInputError naming the file, the field and its value if it is no such adapter, or not one of this base model's width.
    """
    if base.family != "decoder":
        raise BadInputError(f"{folder}: adapters of PEFT are read for decoders, this base model is an {base.family}")
    config = _config(folder / CONFIG)
    for field, expected in EXPECTED.items():
        if config.get(field) != expected:
            raise BadInputError(f"{folder / CONFIG}: {field} must be {expected!r}, got {config.get(field)!r}; only prompt tuning is read")
    path = folder / WEIGHTS
    most = MAX_TOKENS * base.hidden_size * 4 + MAX_HEADER
    if path.is_file() and path.stat().st_size > most:
        raise BadInputError(
            f"{path}: must take at most {most:,} bytes, which is {MAX_TOKENS:,} virtual tokens on this base model, got "
            f"{path.stat().st_size:,}; it holds more than a soft prompt, which is not read"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInputError(f"{path} cannot be read: {error}; save the adapter with safe_serialization=True") from None
    if set(tensors) != {TENSOR}:
        raise BadInputError(f"{path}: must hold {TENSOR} alone, got {', '.join(sorted(tensors))}; a changed base model is not read")
    tensor = tensors[TENSOR]
    if tensor.dtype not in DTYPES:
        raise BadInputError(f"{path}: {TENSOR} must be of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    declared = [config.get("num_virtual_tokens"), config.get("token_dim")]
    if list(tensor.shape) != declared or not len(tensor):
        raise BadInputError(f"{path}: {TENSOR} must be [num_virtual_tokens, token_dim] = {declared}, got {list(tensor.shape)}")
    if tensor.shape[1] != base.hidden_size:
        raise BadInputError(
            f"{path}: {TENSOR} must have the base model's hidden size {base.hidden_size}, got {tensor.shape[1]}; "
            f"it was tuned on {config.get('base_model_name_or_path')!r}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise BadInputError(f"{path}: {TENSOR} holds values that are not finite; tune it again at a lower learning rate")
    return {TENSOR: tensor.to(base.device, torch.float32)}


def _config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}; name the folder that PEFT's save_pretrained wrote") from None
    if not isinstance(config, dict):
        raise BadInputError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config
