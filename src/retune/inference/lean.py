"""A decoder's layers, doing less for the same results: the last one answers where it is asked, and what lies between the matrix
products passes over memory less often on a CPU, where nothing fuses it.

Each part changes the class of a module of transformers to one that derives from it, and leaves it to its own arithmetic wherever the
conditions of the change do not hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from retune.inference.attention import Pass

__all__ = ["Asked", "make_lean"]

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """A run whose hidden states are read at some tokens alone: in the last layer the others give keys and values, and nothing more."""

    over: Pass
    places: torch.Tensor
    """Tokens, [K], each once."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return self.over.attend(layer, q, k, v, scale)


def make_lean(model: Any) -> None:
    """Changes a decoder of transformers in place; once is enough. On one that Accelerate laid over several GPUs nothing comes of it: there
    each module keeps its own forward."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            _change(module, _norm)
        elif name.endswith("MLP") and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation"):
            _change(module, _gated)
        elif name.endswith("Attention") and "apply_rotary_pos_emb" in type(module).forward.__code__.co_names:
            _change(module, _turned)
    body = model.base_model
    _change((body.h if hasattr(body, "h") else body.layers)[-1], _last)


def _change(module: Any, forward: Callable[..., Any]) -> None:
    kind: Any = type(module)
    module.__class__ = _changed(kind, forward)


@cache
def _changed(kind: Any, forward: Callable[..., Any]) -> Any:
    """The class with another forward, which is handed the class's own first. A class changed before: the class itself."""
    if hasattr(kind, "retune_plain"):
        return kind
    plain = kind.forward
    return type(kind.__name__, (kind,), {"retune_plain": plain, "forward": lambda *given, **named: forward(plain, *given, **named)})


def _last(plain: Forward, layer: Any, hidden: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
    """The last layer: hidden [1, T, H] -> [1, T, H], 0 where an `Asked` run does not ask.

    A token's output depends on the others through their keys and values alone. Whatever the layer is made of: it begins a run of all
    tokens, which ends as soon as it has keys and values, and then runs at those asked for.
    """
    run = named.get("retune")
    if not isinstance(run, Asked):
        return plain(layer, hidden, *given, **named)
    tokens, places = hidden.shape[1], run.places.to(hidden.device)

    def chosen(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(chosen(item) for item in value)
        per_token = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == tokens
        return value.index_select(1, places) if per_token else value

    try:
        plain(layer, hidden, *given, **named | {"retune": _KeysAndValues()})
        raise AssertionError("a decoder's layer ran without attention")
    except _EnoughError as enough:
        keys, values = enough.args
    at = {name: chosen(value) for name, value in named.items()}
    out = plain(layer, chosen(hidden), *chosen(given), **at | {"retune": _Chosen(run.over, places, keys, values)})
    return torch.zeros_like(hidden).index_copy(1, places, out)


class _EnoughError(Exception):
    """Carries keys and values out of a layer."""


class _KeysAndValues:
    """The run that ends once there are keys and values."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ARG002 - a Pass
        raise _EnoughError(k, v)


@dataclass(frozen=True)
class _Chosen:
    """The run at the tokens asked for, over the keys and values of all."""

    over: Pass
    places: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ARG002 - a Pass
        everywhere = q.new_zeros(q.shape[0], self.keys.shape[1], q.shape[2]).index_copy(1, self.places, q)
        return self.over.attend(layer, everywhere, self.keys, self.values, scale).index_select(0, self.places)


def _plain_fp32(*tensors: torch.Tensor) -> bool:
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def _norm(plain: Forward, module: Any, hidden: torch.Tensor) -> torch.Tensor:
    if not _plain_fp32(hidden, module.weight) or module.weight.requires_grad:
        return plain(module, hidden)
    out: torch.Tensor = _Norm.apply(hidden, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


class _Norm(torch.autograd.Function):
    """x w / sqrt(mean(x^2) + eps), arXiv:1910.07467, over the last dimension; w is frozen. x: [..., H]; w: [H]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out: torch.Tensor = (x * scale).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        gradient = upstream[0] * weight
        along = torch.linalg.vecdot(gradient, x).unsqueeze(-1)
        return gradient.mul_(scale).addcmul_(x, along * scale.pow(3) / -x.shape[-1]), None, None


def _gated(plain: Forward, module: Any, hidden: torch.Tensor) -> torch.Tensor:
    if not _plain_fp32(hidden):
        return plain(module, hidden)
    gated: torch.Tensor = _Gate.apply(module.gate_proj(hidden), module.up_proj(hidden))  # type: ignore[no-untyped-call]
    out: torch.Tensor = module.down_proj(gated)
    return out


class _Gate(torch.autograd.Function):
    """silu(gate) * up, arXiv:2002.05202."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        opened = F.silu(gate)
        ctx.save_for_backward(gate, up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, opened = ctx.saved_tensors
        through = upstream[0] * up
        return torch.ops.aten.silu_backward.grad_input(through, gate, grad_input=through), upstream[0] * opened


def _turned(plain: Any, module: Any, *given: Any, **named: Any) -> Any:
    """An attention layer, by its own code with another function for rotary embeddings."""
    return _with_rotation(plain)(module, *given, **named)


@cache
def _with_rotation(plain: Any) -> Any:
    names = plain.__globals__ | {"apply_rotary_pos_emb": partial(_rotate, plain.__globals__["apply_rotary_pos_emb"])}
    again = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    again.__kwdefaults__ = plain.__kwdefaults__
    return again


def _rotate(plain: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [1, H, T, D]; k: [1, G, T, D]; cos, sin: [1, T, D]."""
    if not _plain_fp32(q, k, cos, sin):
        rotated: tuple[torch.Tensor, torch.Tensor] = plain(q, k, cos, sin)
        return rotated
    cos, sin = cos[:, None], sin[:, None]
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotation(torch.autograd.Function):
    """Rotary position embedding, arXiv:2104.09864: element i and element i + D/2 are rotated together. cos, sin: of each element."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (first_sin, second_sin) = x.chunk(2, -1), sin.chunk(2, -1)
        out = x * cos
        half = out.shape[-1] // 2
        out[..., :half].addcmul_(second, first_sin, value=-1)
        out[..., half:].addcmul_(first, second_sin)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (first, second), (first_sin, second_sin) = upstream[0].chunk(2, -1), sin.chunk(2, -1)
        out = upstream[0] * cos
        half = out.shape[-1] // 2
        out[..., :half].addcmul_(second, second_sin)
        out[..., half:].addcmul_(first, first_sin, value=-1)
        return out, None, None
