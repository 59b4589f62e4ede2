"""How near a training step comes to the speed of its matrix products alone, and where the rest of its time goes."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from models import B, random_base, random_rows, retune_loop, start_prompt
from rows import Row, of_rounds, say
from torch.profiler import ProfilerActivity, profile

from retune.inference.base_model import BaseModel
from retune.inference.inputs import EncodedRow

__all__ = ["measure"]

SHARE, RATE, SPENT = "share of the matmul rate", "matmul rate", "where a training step's time goes"
ROUNDS, PROFILES = 5, 2
CASES = (("5M", 32_000, 100), ("30M", 32_000, 100), ("125M", 32_000, 100))
QUICK = ("5M", 4_000, 20)
KINDS = {
    "matmul": {"mm", "addmm", "linear", "mkldnn_linear"},
    "attention": {"bmm", "baddbmm"},
    "elementwise": {"add", "addcmul", "sub", "mul", "div", "neg", "pow", "square", "rsqrt", "mean", "sum", "silu", "linalg_vector_norm"},
    "copies": {"copy", "cat", "clone", "contiguous", "fill", "index_select", "index_add", "index_copy"},
    "loss": {"exp", "amax", "maximum", "gather", "scatter", "where", "masked_fill", "logaddexp"},
}
"""torch's operations, in place and backward ones by the same name; what the loss adds and multiplies counts as elementwise."""


def measure(quick: bool) -> list[Row]:
    cases, rounds = ((QUICK,), 2) if quick else (CASES, ROUNDS)
    return [row for case in cases for row in _measured(*case, rounds)]


def _measured(size: str, vocab: int, soft: int, rounds: int) -> list[Row]:
    shown = f"{size}, vocabulary {vocab // 1000}k, P={soft}, fp32"
    say(f"share of the matmul rate: {shown}")
    base = random_base(size, vocab)
    step = retune_loop(base, start_prompt(size, soft))
    shares, rates, reached = [], [], []
    for number in range(rounds + 1):
        rows = random_rows(B, vocab, number)
        products, flops = _products(base, rows, soft)
        seconds, alone = step(rows), _seconds(products)
        if not number:
            continue
        rates.append(flops / alone / 1e9)
        reached.append(flops / seconds / 1e9)
        shares.append(100 * alone / seconds)
    return [
        of_rounds(SHARE, shown, shares, "%"),
        of_rounds(RATE, f"{shown}: the matrix products alone", rates, "GF/s"),
        of_rounds(RATE, f"{shown}: the whole step", reached, "GF/s"),
        *_spent(shown, lambda: step(rows)),
    ]


def _products(base: BaseModel, rows: Sequence[EncodedRow], soft: int) -> tuple[list[Callable[[], torch.Tensor]], int]:
    """All products with a frozen weight that a step needs, forward and back, and their floating-point operations.

    Of the last layer and of the output embedding only what answers are predicted from is needed; of the last layer keys and values of all.
    """
    tokens, answers = soft + sum(len(row.read) for row in rows), sum(len(row.answer) for row in rows)
    found: list[Callable[[], torch.Tensor]] = []
    flops = 0

    def both_ways(weight: torch.Tensor, count: int) -> None:
        nonlocal flops
        outs, ins = weight.shape
        x, gradient = torch.randn(count, ins), torch.randn(count, outs)
        found.append(lambda: F.linear(x, weight))
        found.append(lambda: gradient @ weight)
        flops += 4 * count * weight.numel()

    *layers, last = base.model.base_model.layers
    for layer in (*layers, last):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                everywhere = layer is not last or name.endswith(("k_proj", "v_proj"))
                both_ways(module.weight, tokens if everywhere else answers)
    both_ways(base.model.get_output_embeddings().weight, answers)
    return found, flops


@torch.no_grad()
def _seconds(products: Sequence[Callable[[], torch.Tensor]]) -> float:
    begun = time.perf_counter()
    for product in products:
        product()
    return time.perf_counter() - begun


def _spent(shown: str, step: Callable[[], object]) -> list[Row]:
    """Percent of a step's time by kind of operation, as torch.profiler sees it; the profiler itself makes small models look slower."""
    percents: dict[str, list[float]] = defaultdict(list)
    for _ in range(PROFILES):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            begun = time.perf_counter()
            step()
            taken = (time.perf_counter() - begun) * 1e6
        micros = dict.fromkeys(KINDS, 0.0)
        for event in profiler.key_averages():
            kind = _kind(event.key.removeprefix("aten::"))
            if kind:
                micros[kind] += event.self_cpu_time_total
        for kind, spent in micros.items():
            percents[kind].append(100 * spent / taken)
        percents["other"].append(100 - 100 * sum(micros.values()) / taken)
    return [of_rounds(SPENT, f"{shown}: {kind}", values, "%") for kind, values in percents.items()]


def _kind(name: str) -> str | None:
    for kind, names in KINDS.items():
        if name.removesuffix("_backward").removesuffix("_") in names:
            return kind
    return "attention" if any(word in name for word in ("softmax", "scaled_dot_product", "flash_attention")) else None
