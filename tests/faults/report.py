"""benchmarks/faults.json, and the table of docs/reliability.md that is made from it. Both are written anew after every scenario."""

import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from faults.scenario import SCENARIOS, Row

__all__ = ["PAGE", "RESULTS", "Skipped", "read", "write"]

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks/faults.json", ROOT / "docs/reliability.md"
BEGIN, END = "<!-- begin: written by make faults -->", "<!-- end: written by make faults -->"


class Skipped(TypedDict):
    """A scenario without a row of its own."""

    name: str
    fault: str
    stage: str
    reason: str


class Results(TypedDict):
    machine: str
    rows: list[Row]
    not_run: list[Skipped]


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def read() -> Results:
    if not RESULTS.is_file():
        return {"machine": machine(), "rows": [], "not_run": []}
    results: Results = json.loads(RESULTS.read_text("utf-8"))
    return results


def write(results: Results, row: Row | None = None, skipped: Skipped | None = None, to: Path = RESULTS, page: Path = PAGE) -> Results:
    """Puts a row, or the reason for which there is none, in the place of what was known of its scenario; files are replaced whole."""
    name = row["name"] if row else skipped["name"] if skipped else ""
    rows = [old for old in results["rows"] if old["name"] != name and old["name"] in SCENARIOS]
    known = {one["name"] for one in (*rows, *((row,) if row else ()))}
    told = [old for old in results["not_run"] if old["name"] not in {name, *known} and old["name"] in SCENARIOS]
    order = list(SCENARIOS)
    found: Results = {
        "machine": machine(),
        "rows": sorted([*rows, *([row] if row else [])], key=lambda one: order.index(one["name"])),
        "not_run": sorted([*told, *([skipped] if skipped else [])], key=lambda one: order.index(one["name"])),
    }
    _replace(to, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    text = page.read_text("utf-8")
    _replace(page, re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table(found)}\n{END}", text, flags=re.DOTALL))
    return found


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def table(results: Results) -> str:
    """Every row, then what has none, with the reason."""
    lines = [
        f"Measured on: {results['machine']}.",
        "",
        "| fault | stage | what was done | what happened | recovered | s | lost | doubled |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        recovered = "yes" if row["recovered"] else "**no**"
        figures = (f"{row['seconds']:.1f}", str(row["lost"]), str(row["doubled"]))
        lines += [_line(row["fault"], row["stage"], row["did"], row["happened"], recovered, *figures)]
    reasons = {one["name"]: one["reason"] for one in results["not_run"]}
    done = {row["name"] for row in results["rows"]}
    missing = [(s.fault, s.stage, s.did, reasons.get(name, "never run")) for name, s in SCENARIOS.items() if name not in done]
    if missing:
        lines += ["", "Not run:", "", "| fault | stage | what would be done | why not |", "|---|---|---|---|"]
        lines += [_line(*each) for each in missing]
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """Fit for a table's cell; folders of this run's own, which name nothing afterwards, are left out."""
    text = re.sub(r"/\S*/(?=[\w.-])", "…/", text)
    return " ".join(text.replace("|", "\\|").split())


def skipped(names: Iterable[str], reason: str) -> list[Skipped]:
    return [{"name": name, "fault": SCENARIOS[name].fault, "stage": SCENARIOS[name].stage, "reason": reason} for name in names]
