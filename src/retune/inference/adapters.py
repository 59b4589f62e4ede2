"""What tuned tensors make of a base model: a prefix before every row, or a copy of the model with other weights.

The tensors are named as in PEFT's adapter files. PEFT is not imported: what it adds to a linear layer is linear, and is added to the
layer's weights once.

Letters as in `attention`: G key-value heads, D their size, L layers, P virtual tokens, H hidden size.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from retune.config import Prompt, Tune
from retune.errors import BadInputError
from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel
from retune.inference.families import check_fits, family_of

__all__ = ["EMBEDDINGS", "HEAD", "MODULE", "key_value_heads", "layer_prefix", "model_with", "soft_prompt", "tuned_model", "untrained_head"]

EMBEDDINGS = "prompt_embeddings"
"""Name of a soft prompt, [P, H], and of a prefix, [P, 2 * L * G * D]."""
MODULE = "base_model.model."
"""What the names of an adapter's other tensors begin with, before the name of the layer that they change."""
HEAD = ("classifier.weight", "classifier.bias")
"""Names of an encoder's classification head, [C, H] and [C]."""


@torch.no_grad()
def tuned_model(base: BaseModel, prompt: Prompt, tensors: Mapping[str, torch.Tensor]) -> tuple[BaseModel, Prefix | None]:
    """What rows run through: a model and a prefix. `base` stays as it is; weights that are not tuned are shared with it.

    tensors: of a release by `prompt.tune.method`; none: the template alone.

    Raises BadInputError naming the tensor that does not fit the base model, or a task or method that its family does not offer.
    """
    check_fits(base, prompt)
    tune = prompt.tune
    on_device = {name: tensor.detach().to(base.device) for name, tensor in tensors.items()}
    head = {name: on_device.pop(name) for name in HEAD if name in on_device}
    if set(head) != set(HEAD if base.family == "encoder" and tensors else ()):
        wanted = f"must hold {' and '.join(HEAD)}" if base.family == "encoder" else "must hold no classification head"
        raise BadInputError(f"{prompt.name}: what was tuned on a base model of type {base.family} {wanted}, got {sorted(head) or 'none'}")
    if base.family == "encoder":
        weight, bias = untrained_head(base, prompt)
        for name, start in zip(HEAD, (weight, bias), strict=True):
            _check(name, head.setdefault(name, start), tuple(start.shape))
        base = replace(base, head=(head[HEAD[0]], head[HEAD[1]]))
    if (soft := soft_prompt(tune, on_device)) is not None:
        _check(EMBEDDINGS, soft, (soft.shape[0], base.hidden_size))
        return base, family_of(base).run_prefix(base, soft)
    if EMBEDDINGS in on_device:
        return base, layer_prefix(base, on_device[EMBEDDINGS])
    weights = on_device
    if tune.method == "lora":
        weights = _with_lora(base.model, on_device, tune.lora_alpha / tune.lora_rank)
    elif tune.method == "ia3":
        weights = _with_ia3(base.model, on_device)
    return (replace(base, model=model_with(base.model, weights)) if weights else base), None


def untrained_head(base: BaseModel, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a head that gives every label the same share, fp32."""
    return (torch.zeros(len(prompt.labels), base.hidden_size, device=base.device), torch.zeros(len(prompt.labels), device=base.device))


def soft_prompt(tune: Tune, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """[P, H]; None where something else was tuned, or nothing."""
    return None if tune.method == "prefix_tuning" else tensors.get(EMBEDDINGS)


def key_value_heads(base: BaseModel) -> tuple[int, int]:
    """(G, D)."""
    config = base.model.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(groups), int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_prefix(base: BaseModel, values: torch.Tensor) -> Prefix:
    """values: [P, 2 * L * G * D], for each token each layer's keys, then its values. Gradients flow into them."""
    groups, size = key_value_heads(base)
    layers = base.model.config.num_hidden_layers
    _check(EMBEDDINGS, values, (values.shape[0], 2 * layers * groups * size))
    each = values.to(base.dtype).view(-1, 2 * layers, groups, size).permute(1, 2, 0, 3)  # [2 * L, G, P, D]
    return Prefix(tuple(each[0::2]), tuple(each[1::2]))


def model_with(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """A copy of the model in which `weights` stand for the parameters of these names; every other tensor is the model's own.

    Tied parameters stay tied. Raises BadInputError for a name or shape that the model does not have.
    """
    kept = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for name, value in weights.items():
        parameter = _parameter(model, name)
        _check(name, value, tuple(parameter.shape))
        kept[id(parameter)] = torch.nn.Parameter(value.to(parameter.dtype), requires_grad=False)
    return copy.deepcopy(model, kept)


def _with_lora(model: Any, tensors: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Weight plus B A, `scale` times (arXiv:2106.09685). A: [r, in], B: [out, r]."""
    weights = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix(MODULE).removesuffix(".lora_A.weight")
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            weight = _parameter(model, f"{layer}.weight")
            change = _as_stored(model.get_submodule(layer), b @ a * scale)
            _check(name, change, tuple(weight.shape))
            weights[f"{layer}.weight"] = weight + change
    return weights


def _with_ia3(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weight and bias times a vector (arXiv:2205.05638): [out, 1] scales what a layer gives, [1, in] what it is given."""
    weights = {}
    for name, vector in tensors.items():
        layer = name.removeprefix(MODULE).removesuffix(".ia3_l")
        weight, factor = _parameter(model, f"{layer}.weight"), _as_stored(model.get_submodule(layer), vector)
        _check(name, factor, (weight.shape[0], 1) if factor.shape[1] == 1 else (1, weight.shape[1]))
        weights[f"{layer}.weight"] = weight * factor
        bias = model.get_submodule(layer).bias
        if bias is not None and vector.shape[1] == 1:
            weights[f"{layer}.bias"] = bias * vector[:, 0]
    return weights


def _as_stored(layer: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """weight: [out, in]. GPT-2's layers keep theirs as [in, out]."""
    return weight.T if isinstance(layer, Conv1D) else weight


def _parameter(model: Any, name: str) -> torch.nn.Parameter:
    try:
        parameter: torch.nn.Parameter = model.get_parameter(name)
    except AttributeError:
        raise BadInputError(f"the base model has no {name}; was this tuned on another one?") from None
    return parameter


def _check(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise BadInputError(f"{name} must be {list(expected)} for this base model, got {list(tensor.shape)}")
