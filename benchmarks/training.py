"""Training samples per second: PEFT under transformers' Trainer against Retune, the same rows, weights, threads and precision.

Each side is a process of its own (run as a program this is one), so that neither works in what the other left of the heap. Retune's keeps
freed memory, as stage tune does; the Trainer's is as its defaults are, and the part `allocator` measures both with and without.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from models import LONGEST, SIZES, B, Loop, PeftTrainer, random_base, random_model, random_rows, retune_loop, start_prompt, with_peft
from rows import Row, of_rounds, ratios, say, skipped
from transformers.trainer_pt_utils import get_length_grouped_indices

from retune.inference.inputs import EncodedRow
from retune.prompt_tuning.allocator import keep_freed_memory

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
ALLOCATOR = ((CASES[1], False), (CASES[3], True), (CASES[5], True))
"""Case, and whether its weights are bf16."""
NO_BF16 = "this CPU has neither avx512_bf16 nor amx_bf16"
QUICK = Case("5M", 4_000, 20, 2, precisions=True)


def measure(quick: bool) -> list[Row]:
    return [row for case in ((QUICK,) if quick else CASES) for row in _measured(case)]


def measure_allocator(quick: bool) -> list[Row]:
    """Some cases again, with glibc's allocator as it is and keeping what was freed."""
    cases = ((QUICK, False),) if quick else ALLOCATOR
    return [row for case, bf16 in cases for row in _with_and_without(case, bf16, 1 if quick else 3)]


def _with_and_without(case: Case, bf16: bool, rounds: int) -> list[Row]:
    shown = f"{case}, {'bf16' if bf16 else 'fp32'}, random batches, an allocator that keeps what was freed"
    if bf16 and not _has_bf16():
        return [skipped("allocator", shown, NO_BF16)]
    say(shown)
    kinds = {"as it is": False, "tuned": True}
    sides = {f"{name} {kind}": Side(name, case, bf16, keep=keep) for name in ("trainer", "retune") for kind, keep in kinds.items()}
    with _started(sides) as loops:
        seconds = _interleaved(loops, [random_rows(B, case.vocab, number) for number in range(rounds + 1)])
    pairs = {
        "PEFT + Trainer / Retune, both as they are": ("trainer as it is", "retune as it is"),
        "PEFT + Trainer / Retune, both tuned": ("trainer tuned", "retune tuned"),
        "PEFT + Trainer as it is / Retune tuned": ("trainer as it is", "retune tuned"),
        "PEFT + Trainer as it is / tuned": ("trainer as it is", "trainer tuned"),
        "Retune as it is / tuned": ("retune as it is", "retune tuned"),
    }
    return [ratios("allocator", f"{shown}: {name}", seconds[slow], seconds[fast]) for name, (slow, fast) in pairs.items()]


def _measured(case: Case) -> list[Row]:
    say(f"training: {case}")
    free = psutil.virtual_memory().available
    if case.logits_bytes > free:
        reason = f"PEFT's logits need about {case.logits_bytes / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        return [skipped(FIGURE, f"{case}, fp32", reason)]
    sides = {"trainer": Side("trainer", case), "retune": Side("retune", case)}
    missing: list[Row] = []
    if case.precisions:
        more, missing = _precisions(case)
        sides |= more
    with _started(sides) as loops:
        seconds, samples = _rounds(case, loops)
    rows = [
        ratios(FIGURE, f"{case}, fp32: PEFT + Trainer, random batches / Retune", seconds["trainer"], seconds["retune"]),
        ratios(FIGURE, f"{case}, fp32: PEFT + Trainer, grouped by length / Retune", seconds["trainer grouped"], seconds["retune grouped"]),
        of_rounds(RATE, f"{case}, fp32: PEFT + Trainer, random batches", [samples / s for s in seconds["trainer"]], "samples/s"),
        of_rounds(RATE, f"{case}, fp32: Retune, the same batches", [samples / s for s in seconds["retune"]], "samples/s"),
    ]
    if "retune oneDNN" in sides:
        onednn = f"{case}, fp32 by oneDNN"
        rows.append(ratios(FIGURE, f"{onednn}: PEFT + Trainer, random batches / Retune", seconds["trainer"], seconds["retune oneDNN"]))
        grouped = seconds["trainer grouped"], seconds["retune oneDNN grouped"]
        rows.append(ratios(FIGURE, f"{onednn}: PEFT + Trainer, grouped by length / Retune", *grouped))
    if "retune bf16" in sides:
        for name, baseline in (("fp32", "trainer"), ("bf16", "trainer bf16")):
            for kind, suffix in (("random batches", ""), ("grouped by length", " grouped")):
                shown = f"{case}, bf16 weights: PEFT + Trainer in {name}, {kind} / Retune"
                rows.append(ratios(FIGURE, shown, seconds[baseline + suffix], seconds["retune bf16" + suffix]))
    return rows + missing


def _precisions(case: Case) -> tuple[dict[str, "Side"], list[Row]]:
    """Sides with oneDNN's products and with bf16 weights, and the rows that say why there is none."""
    sides: dict[str, Side] = {}
    missing: list[Row] = []
    error, same = _onednn_probe(case.size)
    if same:
        missing.append(skipped(FIGURE, f"{case}, fp32 by oneDNN", "on this CPU the setting changes no bit of a product"))
    elif error >= ONEDNN_ERROR:
        missing.append(skipped(FIGURE, f"{case}, fp32 by oneDNN", f"relative error {error:.0e}"))
    else:
        sides["retune oneDNN"] = Side("retune", case, onednn=True)
    if _has_bf16():
        sides |= {"trainer bf16": Side("trainer", case, bf16=True), "retune bf16": Side("retune", case, bf16=True)}
    else:
        missing.append(skipped(FIGURE, f"{case}, bf16 weights", NO_BF16))
    return sides, missing


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


def _interleaved(loops: dict[str, Loop], batches: Sequence[Sequence[EncodedRow]]) -> dict[str, list[float]]:
    """Seconds of each loop on each of the batches but the first, in turn."""
    seconds = [{name: loop(rows) for name, loop in loops.items()} for rows in batches]
    return {name: [found[name] for found in seconds[1:]] for name in loops}


def _grouped(rows: Sequence[EncodedRow]) -> list[list[EncodedRow]]:
    """Batches as `train_sampling_strategy="group_by_length"` makes them, those of the longest rows first."""
    order = get_length_grouped_indices([len(row) for row in rows], B, generator=torch.Generator().manual_seed(0))
    batches = [[rows[i] for i in order[at : at + B]] for at in range(0, len(order), B)]
    return sorted(batches, key=lambda batch: -sum(map(len, batch)))


def _has_bf16() -> bool:
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _onednn(on: bool) -> None:
    """fp32 products by oneDNN, which may take bf16 parts where that is quicker; on many CPUs it computes in fp32 all the same."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if on else "none"


def _onednn_probe(size: str) -> tuple[float, bool]:
    """(largest relative error of a product against fp64 over the layers' shapes, both directions; whether the setting changes no bit)."""
    hidden, _, heads, groups, width = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    error, same = 0.0, True
    for ins, outs in ((hidden, hidden), (hidden, hidden * groups // heads), (hidden, width), (width, hidden)):
        x, weight = (torch.randn(n, ins, generator=generator) for n in (512, outs))
        for a, b in ((x, weight), (F.linear(x, weight), weight.t().contiguous())):
            plain = F.linear(a, b)
            _onednn(True)
            found = F.linear(a, b)
            _onednn(False)
            exact = F.linear(a.double(), b.double())
            error = max(error, float((found - exact).norm() / exact.norm()))
            same = same and torch.equal(plain, found)
    return error, same


@dataclass(frozen=True)
class Side:
    """A loop in a process of its own."""

    name: str
    """trainer or retune."""
    case: Case
    bf16: bool = False
    onednn: bool = False
    keep: bool | None = None
    """Whether freed memory is kept; None: as the side is when nobody says anything."""

    def start(self) -> "subprocess.Popen[str]":
        keep = self.name == "retune" if self.keep is None else self.keep
        settings = [self.name, self.case.size, self.case.vocab, self.case.soft, self.bf16, self.onednn, keep]
        command = [sys.executable, str(Path(__file__)), json.dumps(settings)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def _started(sides: dict[str, Side]) -> Iterator[dict[str, Loop]]:
    """The sides' loops; their processes end with the block."""
    with ExitStack() as stack:
        yield {name: _loop(stack.enter_context(side.start())) for name, side in sides.items()}


def _loop(process: "subprocess.Popen[str]") -> Loop:
    def run(rows: Sequence[EncodedRow]) -> float:
        process.stdin.write(json.dumps([[row.prompt, row.answer] for row in rows]) + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return run


def main() -> None:
    """Reads rows, a line of JSON for each run, and prints its seconds."""
    name, size, vocab, soft, bf16, onednn, keep = json.loads(sys.argv[1])
    if keep:
        keep_freed_memory()
    _onednn(onednn)
    dtype, start = torch.bfloat16 if bf16 else torch.float32, start_prompt(size, soft)
    loop: Loop
    if name == "trainer":
        loop = PeftTrainer(with_peft(random_model(size, vocab, dtype), start))
    else:
        loop = retune_loop(random_base(size, vocab, dtype), start)
    for line in sys.stdin:
        print(loop([EncodedRow(*row) for row in json.loads(line)]), flush=True)


if __name__ == "__main__":
    main()
