"""The tables of a decision, whoever draws them: as a page (`retune.evaluation.page`) or as Markdown (`retune.evaluation.report`).

Cells are plain text, not escaped: that is for whoever draws them. A table without rows has nothing to say, and is left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from retune.config import Prompt
from retune.evaluation.metrics import task_metrics
from retune.evaluation.roles import CANDIDATE, CHAMPION, ROLE_TITLES
from retune.policy import PROBES
from retune.records import CheckResult, Decision, Evaluation, Measured

__all__ = ["Cell", "Table", "checks", "gates", "labels", "measured", "metrics", "number", "probes", "roles_of", "sets", "slices"]


@dataclass(frozen=True)
class Cell:
    text: str
    form: Literal["text", "number", "strong", "passed", "failed"] = "text"
    """How it is set: text to the left, a number to the right, the name of what decides, what became of a gate or a check."""


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def roles_of(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Roles (`retune.evaluation.roles`) that were evaluated, in the order of columns."""
    return [role for role in ROLE_TITLES if role in evaluations]


def metrics(evaluations: Mapping[str, Evaluation], prompt: Prompt) -> Table:
    """Every metric that any release has, by role; the one that decides is strong."""
    roles, rows = roles_of(evaluations), []
    for metric in task_metrics(prompt.task):
        decides = metric.name == prompt.promote.metric
        figures = [evaluations[role].metrics.get(metric.name) for role in roles]
        if any(value is not None for value in figures) or decides:
            better = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
            name = Cell(metric.name, "strong" if decides else "text")
            rows.append((name, *_numbers(figures), Cell(better), Cell(metric.unit)))
    return Table("Metrics", ("metric", *_titles(roles), "better", "unit"), tuple(rows))


def gates(decision: Decision) -> Table:
    rows = []
    for gate in decision.gates:
        outcome = Cell("passed", "passed") if gate["passed"] else Cell(f"failed: {gate['on_fail']}", "failed")
        interval = " to ".join("unbounded" if end is None else f"{end:.4f}" for end in (gate["low"], gate["high"]))
        figures = (_optional(gate["value"]), "" if gate["low"] is gate["high"] is None else interval, _optional(gate["threshold"]))
        rows.append((Cell(gate["name"]), outcome, *(Cell(text, "number") for text in figures), Cell(gate["reason"])))
    return Table("Gates", ("gate", "outcome", "value", "interval", "threshold", "reason"), tuple(rows))


def labels(evaluations: Mapping[str, Evaluation]) -> Table:
    """F1 by label and role; empty for task: generation."""
    roles = roles_of(evaluations)
    names = dict.fromkeys(label for role in roles for label in evaluations[role].per_class)
    rows = []
    for label in names:
        figures = [evaluations[role].per_class.get(label, {}) for role in roles]
        rows.append((Cell(label), _count(figures), *_numbers(values.get("f1") for values in figures)))
    return Table("F1 by label", ("label", "rows", *_titles(roles)), tuple(rows))


def slices(evaluations: Mapping[str, Evaluation], prompt: Prompt) -> Table:
    """The deciding metric in each slice, by role."""
    flat = {
        role: {f"{column}={value}": figures for column, values in evaluations[role].slices.items() for value, figures in values.items()}
        for role in roles_of(evaluations)
    }
    return _parts("slice", flat, prompt, "{}")


def sets(evaluations: Mapping[str, Evaluation], prompt: Prompt) -> Table:
    """The deciding metric in each labelled set beside the test split, by role."""
    flat = {
        role: {name: figures for name, figures in evaluations[role].sets.items() if name not in PROBES} for role in roles_of(evaluations)
    }
    return _parts("set", flat, prompt, "set={}")


def probes(evaluations: Mapping[str, Evaluation], prompt: Prompt) -> Table:
    """The deciding metric on changed test rows, and the share of them whose output changed with them, by role."""
    roles, limits = roles_of(evaluations), prompt.promote.max_changed
    rows = []
    for probe in PROBES:
        figures = [evaluations[role].sets.get(probe, {}) for role in roles]
        if any(figures):
            values = [values.get(name) for name in (prompt.promote.metric, "changed") for values in figures]
            rows.append((Cell(probe), _count(figures), *_numbers(values), Cell(_optional(limits.get(probe)), "number")))
    head = ("probe", "rows", *_titles(roles), *(f"changed, {title}" for title in _titles(roles)), "most allowed")
    return Table(f"{prompt.promote.metric} on changed rows, and the share of outputs that changed", head, tuple(rows))


def measured(found: Mapping[str, Measured]) -> Table:
    """What was timed, or costs, by role."""
    roles = [role for role in ROLE_TITLES if role in found]
    costs = ["no price set" if found[role].cost is None else f"{found[role].cost:,.4f}" for role in roles]
    times = ["not known" if math.isnan(found[role].tune_seconds) else f"{found[role].tune_seconds:,.1f}" for role in roles]
    figures = {
        ("latency, median", "milliseconds of one prediction"): [f"{found[role].latency_p50_ms:,.1f}" for role in roles],
        ("latency, 95th percentile", "milliseconds of one prediction"): [f"{found[role].latency_p95_ms:,.1f}" for role in roles],
        ("throughput", "tokens per second, read and written"): [f"{found[role].tokens_per_second:,.1f}" for role in roles],
        ("tuned parameters", "values"): [f"{found[role].tuned_parameters:,}" for role in roles],
        ("tuning", "seconds"): times,
        ("cost of tuning", "at RETUNE_DEVICE_HOUR_PRICE"): costs,
    }
    rows = [(Cell(name), *(Cell(text, "number") for text in texts), Cell(unit)) for (name, unit), texts in figures.items() if roles]
    return Table("Latency and cost", ("", *_titles(roles), "unit"), tuple(rows))


def checks(results: Sequence[CheckResult] | None) -> Table:
    """The prompt tests, those that failed first."""
    rows = []
    for result in sorted(results or (), key=lambda result: (result.passed, not result.required)):
        failed = Cell("failed", "failed") if result.required else Cell("failed, reported only")
        outcome = Cell("passed", "passed") if result.passed else failed
        rows.append((Cell(result.name), outcome, Cell("yes" if result.required else "no"), Cell(result.reason)))
    return Table("Checks", ("check", "outcome", "required", "reason"), tuple(rows))


def number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"


def _parts(kind: str, flat: Mapping[str, Mapping[str, Mapping[str, float]]], prompt: Prompt, floor: str) -> Table:
    """flat: role -> name of a part of the rows -> its figures. floor: how `promote.slice_floors` names a part."""
    metric, policy = prompt.promote.metric, prompt.promote
    rows = []
    for name in dict.fromkeys(name for parts in flat.values() for name in parts):
        figures = {role: parts.get(name, {}) for role, parts in flat.items()}
        values = [values.get(metric) for values in figures.values()]
        before, after = (figures.get(role, {}).get(metric) for role in (CHAMPION, CANDIDATE))
        change = "" if before is None or after is None else f"{after - before:+.4f}"
        few = figures.get(CANDIDATE, {}).get("rows", 0) < policy.min_slice_rows
        unpoliced = "no: max_slice_gap not set" if policy.max_slice_gap is None else "no: too few rows" if few else "yes"
        guarded = "yes" if floor.format(name) in policy.slice_floors else unpoliced
        rows.append((Cell(name), _count(figures.values()), *_numbers(values), Cell(change, "number"), Cell(guarded)))
    return Table(f"{metric} by {kind}", (kind, "rows", *_titles(flat), "change", "guarded"), tuple(rows))


def _titles(roles: Iterable[str]) -> tuple[str, ...]:
    return tuple(ROLE_TITLES[role] for role in roles)


def _numbers(values: Iterable[float | None]) -> list[Cell]:
    return [Cell(number(value), "number") for value in values]


def _count(figures: Iterable[Mapping[str, float]]) -> Cell:
    """Rows, as far as the roles agree."""
    return Cell(" / ".join(f"{rows:,.0f}" for rows in sorted({values["rows"] for values in figures if "rows" in values})), "number")


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
