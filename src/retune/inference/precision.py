"""bf16 weights on a processor that multiplies bf16 no faster than fp32: they stay bf16 in memory, products and all between them are fp32.

What is rounded is the weights alone, so that this is nearer to fp32 than products in bf16 are. (Gemma and T5 round some hidden states too:
transformers brings them to the type of a weight.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

__all__ = ["fast_bf16", "multiply_in_fp32"]


def fast_bf16() -> bool:
    """Whether this processor's products of bf16 matrices are faster than those of fp32.

    With AMX they are, and on AMD's processors with AVX-512 BF16 (measured: 1.5 to 2.6 times the steps). Intel's AVX-512 BF16 without AMX
    gave half the rate of fp32, and without either the products are emulated. Other architectures were not measured: they multiply what
    they are given. A rule, not a probe: the same machine takes the same path.
    """
    found = torch.cpu.get_capabilities()
    amd = "AMD" in str(found.get("cpu_name"))
    return bool(found.get("architecture") != "x86_64" or found.get("amx_bf16") or (found.get("avx512_bf16") and amd))


def multiply_in_fp32(model: Any) -> None:
    """Changes a frozen model in place: matrices keep their type and are widened while they are multiplied, all else becomes fp32."""
    for module in model.modules():
        if type(module) in _WIDENED:
            module.__class__ = _WIDENED[type(module)]
        elif isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(_widen)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.data = parameter.data.float()


def _widen(module: torch.nn.Module, given: Any, vectors: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 - a hook
    return vectors.float()


class _Product(torch.autograd.Function):
    """x W^T + b, x of fp32: autograd would keep each widened W until its backward, all of them at once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x: [..., in]; weight: [out, in], frozen; bias: [out], fp32."""
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return upstream[0] @ weight.to(upstream[0].dtype), None, None


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


class _Linear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x.float(), self.weight, self.bias)


class _Conv1D(Conv1D):
    """GPT-2's, which keeps its weight as [in, out]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x.float(), self.weight.T, self.bias)


_WIDENED = {torch.nn.Linear: _Linear, Conv1D: _Conv1D}
