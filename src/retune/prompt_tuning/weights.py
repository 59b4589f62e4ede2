"""What can be tuned inside a copy of the base model: small additions to its linear layers, or all of its weights.

Every linear layer works position by position, so that packed rows pass through as they do through the frozen model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from retune.errors import BadInputError
from retune.inference.adapters import HEAD, MODULE, model_with
from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel
from retune.prompt_tuning.trainer import Tuned

__all__ = ["Adapter", "AllWeights", "WithHead", "ia3", "lora"]

ADAPTER = ".default"
"""PEFT's name of a model's only adapter, which its files leave out."""


class Adapter:
    """What PEFT adds to linear layers; the layers' own weights stay frozen, and are shared with the base model."""

    size = 0

    def __init__(self, base: BaseModel, config: Any, seed: int) -> None:
        """config: a PEFT configuration whose target modules exist."""
        from peft import inject_adapter_in_model

        model = model_with(base.model, {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        self.base = replace(base, model=model.eval())
        self.parameters: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.promote_types(base.dtype, torch.float32))
                self.parameters[name] = parameter

    def prefix(self) -> Prefix | None:
        return None

    def released(self, best: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {MODULE + name.replace(ADAPTER, ""): tensor for name, tensor in best.items()}


class AllWeights:
    """Every weight of the model, for when a prompt is not enough. What changed is released."""

    size = 0

    def __init__(self, base: BaseModel) -> None:
        self._start = dict(base.model.named_parameters())
        model = model_with(base.model, {name: weight.detach().clone() for name, weight in self._start.items()}).requires_grad_(True)
        self.base = replace(base, model=model)
        self.parameters: dict[str, torch.Tensor] = dict(model.named_parameters())

    def prefix(self) -> Prefix | None:
        return None

    def released(self, best: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in best.items() if not torch.equal(tensor, self._start[name])}


class WithHead:
    """Whatever a method tunes, and an encoder's classification head with it."""

    def __init__(self, tuned: Tuned, start: tuple[torch.Tensor, torch.Tensor]) -> None:
        """start: weight [C, H] and bias [C], left as they are."""
        weight, bias = (tensor.detach().clone().requires_grad_(True) for tensor in start)
        self._tuned, self._head = tuned, dict(zip(HEAD, (weight, bias), strict=True))
        self.base, self.size = replace(tuned.base, head=(weight, bias)), tuned.size
        self.parameters: dict[str, torch.Tensor] = {**tuned.parameters, **self._head}

    def prefix(self) -> Prefix | None:
        return self._tuned.prefix()

    def released(self, best: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        body = {name: tensor for name, tensor in best.items() if name not in self._head}
        return self._tuned.released(body) | {name: best[name] for name in self._head}


def lora(base: BaseModel, rank: int, alpha: int, modules: Sequence[str] | None, seed: int) -> Adapter:
    """LoRA (arXiv:2106.09685): a product of two thin matrices beside a weight. It starts at 0.

    modules: names of linear layers; None: PEFT's choice for the model's type. Raises BadInputError if the model lacks one.
    """
    from peft import LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    layers = _linear_layers(base, modules or KNOWN.get(base.model.config.model_type))
    return Adapter(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, fan_in_fan_out=_turned(base, layers)), seed)


def ia3(base: BaseModel, modules: Sequence[str] | None, seed: int) -> Adapter:
    """(IA)3 (arXiv:2205.05638): a vector that scales what a linear layer gives, or in the feed-forward block what it is given.

    It starts at 1. modules: as for `lora`. Raises BadInputError if the model lacks one.
    """
    from peft import IA3Config
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    kind = base.model.config.model_type
    layers = _linear_layers(base, modules or KNOWN.get(kind))
    inner = [layer for layer in layers if layer.endswith(tuple(FEEDFORWARD.get(kind, ())))]
    config = IA3Config(target_modules=layers, feedforward_modules=inner, fan_in_fan_out=_turned(base, layers))
    return Adapter(base, config, seed)


def _linear_layers(base: BaseModel, modules: Sequence[str] | None) -> list[str]:
    """Full names of the layers that `modules` name by their last parts, below the output embedding."""
    head = base.model.get_output_embeddings()
    found = [name for name, layer in base.model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head]
    known = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
    if modules is None:
        kind = base.model.config.model_type
        raise BadInputError(f"tune.target_modules must be given for a base model of type {kind}, which PEFT does not know; it has {known}")
    absent = [module for module in modules if not any(f".{name}".endswith(f".{module}") for name in found)]
    if absent:
        raise BadInputError(f"tune.target_modules must name linear layers of the base model, got {', '.join(absent)}; it has {known}")
    return [name for name in found if any(f".{name}".endswith(f".{module}") for module in modules)]


def _turned(base: BaseModel, layers: Sequence[str]) -> bool:
    """Whether the layers keep their weights as [in, out], as GPT-2's do."""
    return isinstance(base.model.get_submodule(layers[0]), Conv1D)
