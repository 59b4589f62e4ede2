"""benchmarks/results.json and the table of docs/performance.md that is made from it."""

import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from rows import Row

from retune.machine import machine

__all__ = ["Results", "described", "merged", "read", "shown", "write"]

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results.json", ROOT / "docs/performance.md"
BEGIN, END = "<!-- begin: written by make bench -->", "<!-- end: written by make bench -->"


class Results(TypedDict):
    machine: str
    rows: list[Row]


def described() -> str:
    """The machine and what ran on it."""
    import torch

    flags = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    processor = f"{platform.machine()}, {machine()['processor']} ({', '.join(flags) or 'no vector extensions known'})"
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}"


def read() -> Results | None:
    if not RESULTS.is_file():
        return None
    results: Results = json.loads(RESULTS.read_text("utf-8"))
    return results


def merged(before: Results | None, found: Results) -> Results:
    """The figures found in place of those of the same name, where these stood; figures of another machine are dropped, as ratios do not
    carry over."""
    if before is None or before["machine"] != found["machine"]:
        return found
    figures = {row["figure"] for row in found["rows"]}
    rows = [row for row in before["rows"] if row["figure"] not in figures] + found["rows"]
    order = list(dict.fromkeys(row["figure"] for row in [*before["rows"], *found["rows"]]))
    return {"machine": found["machine"], "rows": sorted(rows, key=lambda row: order.index(row["figure"]))}


def write(results: Results, to: Path = RESULTS, page: Path = PAGE) -> None:
    to.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    text = page.read_text("utf-8")
    page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{_table(results)}\n{END}", text, flags=re.DOTALL), "utf-8")


def shown(row: Row) -> tuple[str, str, str]:
    """Median, least and most with their unit; a figure that was not measured says why."""
    if row["value"] is None or row["low"] is None or row["high"] is None:
        return row["unit"], "", ""
    median, low, high = (_number(x) for x in (row["value"], row["low"], row["high"]))
    return f"{median} {row['unit']}", low, high


def _number(x: float) -> str:
    return f"{x:.2g}" if abs(x) < 0.1 else f"{x:.2f}" if x < 100 else f"{x:,.0f}"


def _table(results: Results) -> str:
    lines = [f"Measured on: {results['machine']}."]
    for figure in dict.fromkeys(row["figure"] for row in results["rows"]):
        lines += ["", f"**{figure[0].upper()}{figure[1:]}**", "", "| case | median | least | most |", "|---|---|---|---|"]
        lines += [_line(row["case"], *shown(row)) for row in results["rows"] if row["figure"] == figure]
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
