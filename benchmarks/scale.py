"""Ingest and stage preprocess on a hundred thousand and a million generated rows, beside pandas reading and writing the same file.

Each measurement is a process of its own, which says its seconds and the most memory that it ever held; all take turns within a round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rows import Row, of_rounds, ratios, say

__all__ = ["measure", "tickets"]

FIGURE = "scale"
ROOT = Path(__file__).parents[1]
PROMPT = "ticket_priority"
ROWS, ROUNDS = (100_000, 1_000_000), 2
QUICK_ROWS, QUICK_ROUNDS = (2_000, 20_000), 1
SIDES = ("parquet", "csv", "ingest", "preprocess")
NAMES = {
    "parquet": "pandas' read and write as Parquet",
    "csv": "pandas' read and write as CSV",
    "ingest": "all of ingest",
    "preprocess": "stage preprocess",
}
BLOCK = 10_000

LABELS = ("low", "medium", "high")
CHANNELS = ("email", "chat", "phone", "web", "app")
REGIONS = ("emea", "amer", "apac")
SYLLABLES = ("ba", "co", "di", "fer", "gan", "hel", "in", "jo", "kar", "lu", "men", "nor", "o", "pre", "qui", "ra", "sto", "tu", "ver")
VOCABULARY = 150_000
OPENINGS = ("Hello, ", "Hi team, ", "", "", "", "Please help: ", "Urgent! ", "Good morning, ", "", "Since yesterday ")


def measure(quick: bool) -> list[Row]:
    sizes, rounds = (QUICK_ROWS, QUICK_ROUNDS) if quick else (ROWS, ROUNDS)
    found: dict[tuple[str, int], list[dict[str, float]]] = {(side, size): [] for side in SIDES for size in sizes}
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            landing = Path(scratch) / str(size) / "landing"
            landing.mkdir(parents=True)
            with (landing / "tickets.csv").open("w", encoding="utf-8", newline="") as file:
                file.writelines(tickets(size))
        for number in range(rounds):
            for (side, size), results in found.items():
                command = [sys.executable, str(Path(__file__)), json.dumps([side, str(Path(scratch) / str(size))])]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
                seconds = ", ".join(f"{name} {value:.1f}" for name, value in results[-1].items())
                say(f"scale, round {number + 1}, {side}, {size:,} rows: {seconds}")
    return [row for size in sizes for row in _of_size(size, {side: found[side, size] for side in SIDES})] + _growth(*sizes, found)


def _of_size(size: int, found: dict[str, list[dict[str, float]]]) -> list[Row]:
    seconds = {side: [result["seconds"] for result in results] for side, results in found.items()}
    apart = [result["redaction and exact duplicates"] for result in found["ingest"]]
    rest = [whole - part for whole, part in zip(seconds["ingest"], apart, strict=True)]
    near = [result["near-duplicates"] for result in found["preprocess"]]
    tokens = [result["token lengths"] for result in found["preprocess"]]
    parts = {
        "ingest but for redaction and exact duplicates": rest,
        "redaction and exact duplicates": apart,
        "all of ingest": seconds["ingest"],
    }
    return [
        *(
            ratios(FIGURE, f"{size:,} rows: {part} / {NAMES[plain]}", values, seconds[plain])
            for plain in ("csv", "parquet")
            for part, values in parts.items()
        ),
        *(of_rounds(FIGURE, f"{size:,} rows: {NAMES[side]}", [size / x for x in seconds[side]], "rows/s") for side in SIDES),
        of_rounds(FIGURE, f"{size:,} rows: near-duplicates, of it", near, "s"),
        of_rounds(FIGURE, f"{size:,} rows: token lengths, of it", tokens, "s"),
        *(of_rounds(FIGURE, f"{size:,} rows: peak memory, {NAMES[side]}", [x["peak"] for x in found[side]], "MiB") for side in SIDES),
    ]


def _growth(small: int, large: int, found: dict[tuple[str, int], list[dict[str, float]]]) -> list[Row]:
    """What a round's large run takes of its small run."""

    def row(what: str, side: str, key: str) -> Row:
        case = f"from {small:,} to {large:,} rows: {what}"
        return ratios(FIGURE, case, [x[key] for x in found[side, large]], [x[key] for x in found[side, small]])

    return [
        *(row(f"{NAMES[plain]}, seconds", plain, "seconds") for plain in ("csv", "parquet")),
        row("all of ingest, seconds", "ingest", "seconds"),
        row("stage preprocess, seconds", "preprocess", "seconds"),
        row("near-duplicates, seconds", "preprocess", "near-duplicates"),
        row("ingest, peak memory", "ingest", "peak"),
        row("stage preprocess, peak memory", "preprocess", "peak"),
    ]


def tickets(count: int, seed: int = 1) -> Iterator[str]:
    """Lines of a landed CSV file, the same for the same count and seed; a smaller count gives the first of them.

    Words are drawn as natural language has them, few often and most seldom. Of 100 rows about 3 repeat one of the 10,000 before them
    and 5 nearly so, 14 hold a mail address, a phone number or a date, 10 an order number, 6 characters that are not ASCII, 4 odd white
    space or entities, 30 commas or a line break and so quotes, 3 a label in capitals, and 2 are of no use: no text, an unknown label,
    too few fields.
    """
    generator = np.random.default_rng(seed)
    picked = generator.integers(0, len(SYLLABLES), (VOCABULARY, 4))
    lengths = generator.integers(1, 5, VOCABULARY)
    words = ["".join(SYLLABLES[s] for s in row[:length]) for row, length in zip(picked.tolist(), lengths.tolist(), strict=True)]
    weights = 1 / (np.arange(VOCABULARY) + 3.0)
    share = np.cumsum(weights / weights.sum())
    yield "id,text,label,channel,region\n"
    before: list[tuple[str, str]] = []
    for start in range(0, count, BLOCK):
        size = np.clip(np.exp(generator.normal(2.6, 0.5, BLOCK)), 2, 80).astype(int)
        drawn = np.searchsorted(share, generator.random(size.sum()), side="right").tolist()
        ends = np.cumsum(size).tolist()
        chances = generator.random((BLOCK, 5)).tolist()
        numbers = generator.integers(0, 10**9, BLOCK).tolist()
        block: list[tuple[str, str]] = []
        for row, (end, length, chance, number) in enumerate(zip(ends, size.tolist(), chances, numbers, strict=True)):
            if start + row == count:
                return
            if chance[3] < 0.08 and before:
                text, rest = before[number % len(before)]
                text += f" {words[number % 1_000]}" * (chance[3] > 0.03)
            else:
                text = _text([words[place % VOCABULARY] for place in drawn[end - length : end]], chance, number)
                text, rest = _spoiled(text, chance[4], number)
            block.append((text, rest))
            shown = f'"{text}"' if "," in text or "\n" in text else text
            yield f"{start + row + 1},{shown}{rest}\n"
        before = block


def _text(words: list[str], chance: list[float], number: int) -> str:
    text = OPENINGS[number % len(OPENINGS)] + " ".join(words)
    digits = f"{number:09d}"
    for upto, more in (
        (0.04, f" write to {words[0]}.{words[-1]}@example.org"),
        (0.08, f" call 0171 {digits[:7]}"),
        (0.09, f" call +1 (555) {digits[:3]}-{digits[3:7]}"),
        (0.14, f" on 2024-0{number % 9 + 1}-1{number % 10}"),
        (0.24, f" order {digits[:6]}"),
    ):
        if chance[0] < upto:
            text += more
            break
    if chance[1] < 0.06:
        text = text.replace("e", "é", 1) + (" 🙂" if chance[1] < 0.01 else " – “bitte”")
    elif chance[1] < 0.10:
        text = text.replace(" ", "  ", 1) + (" &amp; more" if chance[1] < 0.07 else "")
    if chance[2] < 0.2:
        text = text.replace(" ", ", ", 2)
    elif chance[2] < 0.21:
        text = text.replace(" ", "\n", 1)
    return text


def _spoiled(text: str, chance: float, number: int) -> tuple[str, str]:
    """The text and the rest of the line, now and then of no use."""
    label = LABELS[number % 3]
    if chance < 0.03:
        label = label.upper()
    elif chance < 0.04:
        label = "P1"
    elif chance < 0.045:
        text = ""
    elif chance < 0.05:
        return text, ""
    return text, f",{label},{CHANNELS[number % 5]},{REGIONS[number % 3]}"


def parquet(folder: Path) -> Callable[[], dict[str, float]]:
    import pandas as pd

    def run() -> dict[str, float]:
        pd.read_csv(folder / "landing/tickets.csv").to_parquet(folder / "plain.parquet")
        return {}

    return run


def csv(folder: Path) -> Callable[[], dict[str, float]]:
    import pandas as pd

    def run() -> dict[str, float]:
        pd.read_csv(folder / "landing/tickets.csv").to_csv(folder / "plain.csv", index=False)
        return {}

    return run


def ingest(folder: Path) -> Callable[[], dict[str, float]]:
    from retune.config import load_prompt
    from retune.data import ingest
    from retune.data.landing import open_objects

    (item,) = open_objects("landing", root=folder).objects
    prompt = load_prompt(ROOT / f"prompts/{PROMPT}.yaml")
    seconds = _timed(ingest, "redact_rows", "first_of_each")

    def run() -> dict[str, float]:
        result = ingest.ingest_object(prompt, item, 1, folder / "data" / PROMPT)
        return {"redaction and exact duplicates": sum(seconds.values()), "kept": result.kept, "duplicates": result.duplicates}

    return run


def preprocess(folder: Path) -> Callable[[], dict[str, float]]:
    """The stage in a workspace whose parts are those that the ingest before it wrote."""
    from retune.config import load_prompt
    from retune.data import preprocess as module
    from retune.stages.preprocess import main

    os.environ["RETUNE_BASE_MODELS"] = str(ROOT / "examples/base_model")
    os.chdir(folder)
    prompt = load_prompt(ROOT / f"prompts/{PROMPT}.yaml")
    seconds = _timed(module, "resolve", "_tokens")

    def run() -> dict[str, float]:
        main(prompt)
        return {"near-duplicates": seconds["resolve"], "token lengths": seconds["_tokens"]}

    return run


def _timed(module: Any, *names: str) -> dict[str, float]:
    """Seconds spent in each of the module's functions from now on."""
    seconds = dict.fromkeys(names, 0.0)

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    for name in names:
        setattr(module, name, clocked(name, getattr(module, name)))
    return seconds


def _peak() -> float:
    """The most memory that this process held at a time, MiB, what it imported included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main() -> None:
    side, folder = json.loads(sys.argv[1])
    run = {"parquet": parquet, "csv": csv, "ingest": ingest, "preprocess": preprocess}[side](Path(folder))
    start = time.perf_counter()
    parts = run()
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": _peak(), **parts}))


if __name__ == "__main__":
    main()
