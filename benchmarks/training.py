"""Training samples per second: PEFT under transformers' Trainer against Retune, the same rows, weights, threads and precision.

Run as a program it measures one case and prints its rows as JSON: the allocator's settings are read at a process' start.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from models import LONGEST, SIZES, B, Loop, PeftTrainer, random_base, random_model, random_rows, retune_loop, start_prompt, with_peft
from rows import Row, of_rounds, ratios, say, skipped
from transformers.trainer_pt_utils import get_length_grouped_indices

from retune.inference.inputs import EncodedRow

__all__ = ["measure", "measure_allocator"]

FIGURE, RATE = "training samples/s", "training rate"
SECONDS = 60
"""Of a case's rounds, aimed at: as many batches are taken as fit, at least one for each round."""
MOST = 6
"""Batches of a round."""
POOL = 50 * 4 * B
"""Rows of which the Trainer's length grouping makes its batches: four of its groups of 50 batches."""
ONEDNN_ERROR = 1e-6
"""Relative error up to which oneDNN's matrix products count as fp32."""
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""glibc keeps what was freed instead of handing it back to the kernel after each step."""


@dataclass(frozen=True)
class Case:
    size: str
    vocab: int
    soft: int
    """P"""
    rounds: int = 5
    precisions: bool = False
    """Whether bf16 weights and oneDNN are measured beside fp32: they cost as much again and more."""

    def __str__(self) -> str:
        return f"{self.size}, vocabulary {self.vocab // 1000}k, P={self.soft}"

    @property
    def logits_bytes(self) -> int:
        """What PEFT holds at most: logits of all positions, their fp32 copy, their log-softmax, their gradient."""
        return 4 * B * (self.soft + LONGEST) * self.vocab * 4


CASES = (
    Case("5M", 32_000, 20, 3),
    Case("5M", 32_000, 100, precisions=True),
    Case("30M", 32_000, 20, 3),
    Case("30M", 32_000, 100, precisions=True),
    Case("125M", 32_000, 20, 3),
    Case("125M", 32_000, 100, precisions=True),
    Case("5M", 152_000, 20, 3),
    Case("5M", 152_000, 100, 3),
)
ALLOCATOR = CASES[1]
QUICK = Case("5M", 4_000, 20, 2, precisions=True)


def measure(quick: bool) -> list[Row]:
    return [row for case in ((QUICK,) if quick else CASES) for row in _measured(case)]


def measure_allocator(quick: bool) -> list[Row]:
    """One case again in processes of its own, with glibc's allocator as it is and tuned."""
    case, batches, rounds = (QUICK, 1, 1) if quick else (ALLOCATOR, 2, 3)
    found = {}
    for name, settings in (("as it is", {}), ("tuned", TUNED)):
        say(f"allocator {name}")
        command = [sys.executable, str(Path(__file__)), json.dumps([case.size, case.vocab, case.soft, batches, rounds])]
        out = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[name] = json.loads(out.splitlines()[-1])
    tuned, plain = found["tuned"], found["as it is"]
    figure, shown = "allocator", f"{case}, fp32, random batches, large MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_"
    return [
        ratios(figure, f"{shown}: PEFT + Trainer / Retune, both tuned", tuned["trainer"], tuned["retune"]),
        ratios(figure, f"{shown}: PEFT + Trainer tuned / Retune as it is", tuned["trainer"], plain["retune"]),
        ratios(figure, f"{shown}: PEFT + Trainer as it is / tuned", plain["trainer"], tuned["trainer"]),
        ratios(figure, f"{shown}: Retune as it is / tuned", plain["retune"], tuned["retune"]),
    ]


def _measured(case: Case) -> list[Row]:
    say(f"training: {case}")
    free = psutil.virtual_memory().available
    if case.logits_bytes > free:
        reason = f"PEFT's logits need about {case.logits_bytes / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        return [skipped(FIGURE, f"{case}, fp32", reason)]
    base, model = random_base(case.size, case.vocab), random_model(case.size, case.vocab)
    start = start_prompt(case.size, case.soft)
    loops: dict[str, Loop] = {"trainer": PeftTrainer(with_peft(model, start)), "retune": retune_loop(base, start)}
    missing: list[Row] = []
    if case.precisions:
        more, missing = _precisions(case, start, loops["retune"])
        loops |= more
    seconds, samples = _rounds(case, loops)
    rows = [
        ratios(FIGURE, f"{case}, fp32: PEFT + Trainer, random batches / Retune", seconds["trainer"], seconds["retune"]),
        ratios(FIGURE, f"{case}, fp32: PEFT + Trainer, grouped by length / Retune", seconds["trainer grouped"], seconds["retune grouped"]),
        of_rounds(RATE, f"{case}, fp32: PEFT + Trainer, random batches", [samples / s for s in seconds["trainer"]], "samples/s"),
        of_rounds(RATE, f"{case}, fp32: Retune, the same batches", [samples / s for s in seconds["retune"]], "samples/s"),
    ]
    if "retune oneDNN" in loops:
        onednn = f"{case}, fp32 by oneDNN"
        rows.append(ratios(FIGURE, f"{onednn}: PEFT + Trainer, random batches / Retune", seconds["trainer"], seconds["retune oneDNN"]))
        grouped = seconds["trainer grouped"], seconds["retune oneDNN grouped"]
        rows.append(ratios(FIGURE, f"{onednn}: PEFT + Trainer, grouped by length / Retune", *grouped))
    if "retune bf16" in loops:
        for name, baseline in (("fp32", "trainer"), ("bf16", "trainer bf16")):
            for kind, suffix in (("random batches", ""), ("grouped by length", " grouped")):
                shown = f"{case}, bf16 weights: PEFT + Trainer in {name}, {kind} / Retune"
                rows.append(ratios(FIGURE, shown, seconds[baseline + suffix], seconds["retune bf16" + suffix]))
    return rows + missing


def _precisions(case: Case, start: torch.Tensor, retune: Loop) -> tuple[dict[str, Loop], list[Row]]:
    """Loops with oneDNN's products and with bf16 weights, and the rows that say why there is none."""
    loops: dict[str, Loop] = {}
    missing: list[Row] = []
    error, same = _onednn_probe(case.size)
    if same:
        missing.append(skipped(FIGURE, f"{case}, fp32 by oneDNN", "on this CPU the setting changes no bit of a product"))
    elif error >= ONEDNN_ERROR:
        missing.append(skipped(FIGURE, f"{case}, fp32 by oneDNN", f"relative error {error:.0e}"))
    else:
        loops["retune oneDNN"] = _by_onednn(retune)
    if _has_bf16():
        small, reference = random_base(case.size, case.vocab, torch.bfloat16), random_model(case.size, case.vocab, torch.bfloat16)
        loops |= {"trainer bf16": PeftTrainer(with_peft(reference, start)), "retune bf16": retune_loop(small, start)}
    else:
        missing.append(skipped(FIGURE, f"{case}, bf16 weights", "this CPU has neither avx512_bf16 nor amx_bf16"))
    return loops, missing


def _rounds(case: Case, loops: dict[str, Loop]) -> tuple[dict[str, list[float]], int]:
    """Seconds of each loop on random batches, and under "<name> grouped" on the rows of length-grouped ones, others in each round.

    Retune's own batches are random in both: it gains nothing from grouping. Returns the seconds, and the samples of a round.
    """
    seconds: dict[str, list[float]] = {f"{name}{kind}": [] for name in loops for kind in ("", " grouped")}
    warm = random_rows(B // 4, case.vocab, 0)
    for loop in loops.values():
        loop(warm[:1])
    once = 2 * 4 * sum(loop(warm) for loop in loops.values())  # a batch of each loop, random and grouped
    batches = max(1, min(MOST, int(SECONDS / (case.rounds * once))))
    pool = _grouped(random_rows(POOL, case.vocab, 1))
    for number in range(case.rounds):
        # The Trainer's batches of a large data set go from long rows to short ones: evenly spaced picks stand for all of them.
        picks = [pool[int(len(pool) * (j + (number + 0.5) / case.rounds) / batches)] for j in range(batches)]
        grouped = [row for batch in picks for row in batch]
        shuffled = random.Random(number).sample(grouped, len(grouped))
        fresh = random_rows(batches * B, case.vocab, 2 + number)
        for name, loop in loops.items():
            seconds[name].append(loop(fresh))
            seconds[f"{name} grouped"].append(loop(grouped if name.startswith("trainer") else shuffled))
        say(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:.1f} s" for name, found in seconds.items()))
    return seconds, batches * B


def _grouped(rows: Sequence[EncodedRow]) -> list[list[EncodedRow]]:
    """Batches as `train_sampling_strategy="group_by_length"` makes them, those of the longest rows first."""
    order = get_length_grouped_indices([len(row) for row in rows], B, generator=torch.Generator().manual_seed(0))
    batches = [[rows[i] for i in order[at : at + B]] for at in range(0, len(order), B)]
    return sorted(batches, key=lambda batch: -sum(map(len, batch)))


def _has_bf16() -> bool:
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@contextmanager
def _onednn() -> Iterator[None]:
    """fp32 products by oneDNN, which may take bf16 parts where that is quicker; on many CPUs it computes in fp32 all the same."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _by_onednn(loop: Loop) -> Loop:
    def run(rows: Sequence[EncodedRow]) -> float:
        with _onednn():
            return loop(rows)

    return run


def _onednn_probe(size: str) -> tuple[float, bool]:
    """(largest relative error of a product against fp64 over the layers' shapes, both directions; whether the setting changes no bit)."""
    hidden, _, heads, groups, width = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    error, same = 0.0, True
    for ins, outs in ((hidden, hidden), (hidden, hidden * groups // heads), (hidden, width), (width, hidden)):
        x, weight = (torch.randn(n, ins, generator=generator) for n in (512, outs))
        for a, b in ((x, weight), (F.linear(x, weight), weight.t().contiguous())):
            plain = F.linear(a, b)
            with _onednn():
                found = F.linear(a, b)
            exact = F.linear(a.double(), b.double())
            error = max(error, float((found - exact).norm() / exact.norm()))
            same = same and torch.equal(plain, found)
    return error, same


def main() -> None:
    size, vocab, soft, batches, rounds = json.loads(sys.argv[1])
    base = random_base(size, vocab)
    start = start_prompt(size, soft)
    loops: dict[str, Loop] = {"trainer": PeftTrainer(with_peft(random_model(size, vocab), start)), "retune": retune_loop(base, start)}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        rows = random_rows(batches * B if number else B, vocab, number)
        for name, loop in loops.items():
            taken = loop(rows)
            if number:
                seconds[name].append(taken)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
