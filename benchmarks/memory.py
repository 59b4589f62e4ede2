"""Peak memory of a training step over the loaded model, PEFT's loop against Retune on the same batches, each in a process of its own."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from models import B, peft_loop, random_base, random_model, random_rows, retune_loop, start_prompt, with_peft
from rows import Row, of_rounds, say

__all__ = ["measure"]

FIGURE = "peak memory over the model"
SIZE, VOCAB, SOFT, BATCHES = "30M", 32_000, 20, 2
QUICK = "5M", 4_000, 20, 1
EVERY = 0.001
"""Seconds between two looks at the process' memory."""


def measure(quick: bool) -> list[Row]:
    case, rounds = (QUICK, 1) if quick else ((SIZE, VOCAB, SOFT, BATCHES), 3)
    size, vocab, soft, _ = case
    shown = f"{size}, vocabulary {vocab // 1000}k, P={soft}, B={B}, fp32"
    peaks: dict[str, list[float]] = {"peft": [], "retune": []}
    for number in range(rounds):
        for side, found in peaks.items():
            command = [sys.executable, str(Path(__file__)), json.dumps([side, *case, number])]
            found.append(float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]))
        say(f"memory, round {number + 1}: " + ", ".join(f"{side} {found[-1]:.0f} MiB" for side, found in peaks.items()))
    shares = [ours / theirs for ours, theirs in zip(peaks["retune"], peaks["peft"], strict=True)]
    return [
        of_rounds(FIGURE, f"{shown}: Retune / PEFT loop", shares, "x"),
        of_rounds(FIGURE, f"{shown}: PEFT loop", peaks["peft"], "MiB"),
        of_rounds(FIGURE, f"{shown}: Retune", peaks["retune"], "MiB"),
    ]


@contextmanager
def _peak() -> Iterator[list[float]]:
    """The list's last item is the most resident memory seen so far in the block, over that at its start, MiB."""
    process = psutil.Process()
    before, seen, done = process.memory_info().rss, [0.0], threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            seen[-1] = max(seen[-1], (process.memory_info().rss - before) / 2**20)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def main() -> None:
    side, size, vocab, soft, batches, seed = json.loads(sys.argv[1])
    rows = random_rows(batches * B, vocab, seed)
    if side == "retune":
        loop = retune_loop(random_base(size, vocab), start_prompt(size, soft))
    else:
        loop = peft_loop(with_peft(random_model(size, vocab), start_prompt(size, soft)))
    loop(rows[:1])  # what is imported and built at a first step is no part of the peak
    with _peak() as seen:
        loop(rows)
    print(seen[-1])


if __name__ == "__main__":
    main()
