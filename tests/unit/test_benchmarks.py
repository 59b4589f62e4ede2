"""The figures' files: what one part leaves of the others, and that the page shows what was measured."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("report")


def row(figure: str, case: str, value: float | None = 2.0, unit: str = "x") -> dict[str, Any]:
    return {"figure": figure, "case": case, "value": value, "low": value, "high": value, "unit": unit}


def test_the_page_shows_the_results(report: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(report.PAGE.read_text("utf-8"), "utf-8")
    report.write(report.read(), tmp_path / "results.json", page)
    assert page.read_text("utf-8") == report.PAGE.read_text("utf-8")
    assert (tmp_path / "results.json").read_text("utf-8") == report.RESULTS.read_text("utf-8")


def test_one_part_replaces_its_figures_alone(report: ModuleType) -> None:
    before = {"machine": "a", "rows": [row("memory", "old"), row("loop", "kept")]}
    found = {"machine": "a", "rows": [row("memory", "new"), row("speed", "first")]}
    assert [x["case"] for x in report.merged(before, found)["rows"]] == ["new", "kept", "first"]


def test_figures_of_another_machine_are_dropped(report: ModuleType) -> None:
    found = {"machine": "b", "rows": [row("memory", "new")]}
    assert report.merged({"machine": "a", "rows": [row("loop", "other")]}, found) == found
    assert report.merged(None, found) == found


def test_a_figure_not_measured_says_why(report: ModuleType) -> None:
    assert report.shown(row("speed", "bf16", None, "not measured: no bf16")) == ("not measured: no bf16", "", "")
    assert report.shown(row("speed", "fp32", 12.345)) == ("12.35 x", "12.35", "12.35")
    assert report.shown(row("scores", "difference", 7.6e-6, "nats")) == ("7.6e-06 nats", "7.6e-06", "7.6e-06")


def test_every_part_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for module, function, _ in importlib.import_module("bench").PARTS.values():
        assert re.search(rf"^def {function}\(quick: bool\)", (ROOT / f"benchmarks/{module}.py").read_text("utf-8"), re.MULTILINE)


def test_the_gate_s_bootstrap_gives_each_resample_s_own_score_many_times_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick case of `benchmarks/gate.py`, 100 rows: far from the 2,000 of the page, where the ratio is over a thousand."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    rows = importlib.import_module("gate").measure(True)
    found = {(x["case"].split(",")[0], x["case"].split(": ")[1].split(",")[0]): x for x in rows}
    for metric in ("BLEU", "ROUGE-L"):
        assert found[metric, "difference of a resample's gain"]["high"] < 1e-9
        assert found[metric, "each resample scored anew / Retune"]["value"] > 20
