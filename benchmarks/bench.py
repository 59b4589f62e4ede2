"""Measures what the docs claim, as ratios within one run: `make bench` writes benchmarks/results.json.

Rows of `figure, case, value, low, high, unit`: median, least and most of the interleaved rounds.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loop import nothing_new
from rich.console import Console
from rich.table import Table

from retune.config import load_prompt
from retune.ledger import Ledger
from retune.settings import Settings
from retune.tasks.ingest import ingest
from retune.workspace import Workspaces

ROOT = Path(__file__).parents[1]
ROUNDS = 5


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each function, in turn, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(figure: str, case: str, slow: list[float], fast: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"figure": figure, "case": case, "value": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "unit": "x"}


def restored_stage() -> dict[str, Any]:
    """Stage preprocess executed against restored, through the same call."""
    with tempfile.TemporaryDirectory() as scratch:
        landing = Path(scratch) / "home/landing"
        landing.mkdir(parents=True)
        for file in (ROOT / "examples/batches/ticket_priority/1").iterdir():
            shutil.copy(file, landing)
        prompts = Path(scratch) / "prompts"
        prompts.mkdir()
        text = (ROOT / "prompts/ticket_priority.yaml").read_text("utf-8").replace(".retune/landing/ticket_priority", str(landing))
        (prompts / "ticket_priority.yaml").write_text(text, "utf-8")
        os.environ |= {"RETUNE_PROJECT": str(ROOT), "RETUNE_HOME": str(Path(scratch) / "home"), "RETUNE_PROMPTS": str(prompts)}
        quiet: Callable[[str], None] = lambda _: None  # noqa: E731
        ingest("ticket_priority", "bench", "bench", quiet)
        settings = Settings.load()
        workspaces = Workspaces(settings, quiet)
        head = Ledger(workspaces.store, "dataset").head()
        assert head is not None  # noqa: S101 - a benchmark that ingested nothing must not go on
        prompt = load_prompt(prompts / "ticket_priority.yaml")
        lineage = workspaces.lineage(head.body["data"], head.n)
        index = Path(settings.store) / "sections"

        def executed() -> None:
            shutil.rmtree(index, ignore_errors=True)
            workspaces.run("preprocess", prompt, lineage)

        seconds = interleaved({"executed": executed, "restored": lambda: workspaces.run("preprocess", prompt, lineage)}, 3)
        return ratio("stage preprocess", "executed / restored, 338 rows", seconds["executed"], seconds["restored"])


def main() -> None:
    rows = [restored_stage(), *nothing_new()]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    (ROOT / "benchmarks/results.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", "utf-8")
    table = Table("figure", "case", "median", "least", "most", title=machine)
    for row in rows:
        table.add_row(row["figure"], row["case"], *(f"{row[k]:.2f} {row['unit']}" for k in ("value", "low", "high")))
    Console().print(table)


if __name__ == "__main__":
    main()
