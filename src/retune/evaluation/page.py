"""A decision as one HTML page: verdict and reasons first, then the evidence, and a sample of outputs to rate.

One file without outside resources, readable in light and dark, at phone width and on paper. The same input gives the same bytes. All text
comes from data or from people and is escaped by jinja2's autoescape; the page's own Content-Security-Policy lets only its own script run.
A section that has nothing to show is left out; one whose input does not fit says why.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from retune.config import Prompt
from retune.errors import BadInputError
from retune.evaluation import tables
from retune.evaluation.charts import curves_chart, gain_chart, reliability, reliability_chart
from retune.evaluation.metrics import confusion
from retune.evaluation.predictions import check_pair
from retune.evaluation.roles import CANDIDATE, CHAMPION, ROLE_TITLES
from retune.evaluation.sample import GRADES, Sample
from retune.evaluation.tables import Table
from retune.evaluation.worst_flips import Flips, worst_flips
from retune.records import CheckResult, Decision, Evaluation, Lineage, Measured, Trigger
from retune.text import split_references

__all__ = ["Report", "decision_page"]

T = TypeVar("T")

TEMPLATES = Path(__file__).parent / "templates"
PAIR = (CANDIDATE, CHAMPION)
MAX_MATRIX = 20
"""Labels up to which the confusion matrix is drawn whole; of more labels the most frequent confusions are listed."""
CLIPPED, CLIPPED_SAMPLE = 400, 4000
"""Characters of a text in a table, and of one that a person rates."""
MEANING = {
    "PROMOTE": "The candidate may replace the champion.",
    "HOLD": "The champion stays. Nothing is wrong with the candidate.",
    "REJECT": "The champion stays. The candidate is worse, or something is wrong with it.",
}
SIGNS = {"PROMOTE": "▲", "HOLD": "■", "REJECT": "✕"}


@dataclass(frozen=True)
class Report:
    """What is known of a decision. A part that is empty or None has no section."""

    prompt: Prompt
    decision: Decision
    evaluations: Mapping[str, Evaluation]
    """Role (`retune.evaluation.roles`) -> evaluation; candidate and champion among them."""
    predictions: Mapping[str, pd.DataFrame]
    """Of candidate and champion (columns: `retune.evaluation.predictions`)."""
    test: pd.DataFrame
    """The test split: `id` and the prompt's input fields."""
    lineage: Lineage
    """The candidate's."""
    trigger: Trigger
    sample: Sample
    """Rows to rate; ids that the test split lacks are left out."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Trial -> rows with `step` and, where it was measured, `validation_loss`."""
    trial: str = ""
    """The trial that the candidate comes from."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """Role -> what was timed."""
    checks: Sequence[CheckResult] | None = None


@dataclass(frozen=True)
class Answered:
    """One test row for a person to read."""

    id: str
    inputs: tuple[tuple[str, str], ...]
    """Field and text."""
    references: tuple[str, ...]
    outputs: tuple[str, str]
    """Of PAIR, or as A and B."""
    kind: str = ""


def decision_page(report: Report) -> str:
    style, script = ((TEMPLATES / f"decision.{kind}").read_text("utf-8") for kind in ("css", "js"))
    values = {
        "report": report,
        "prompt": report.prompt,
        "decision": report.decision,
        "sign": SIGNS[report.decision.verdict],
        "meaning": MEANING[report.decision.verdict],
        "titles": ROLE_TITLES,
        "pair": PAIR,
        "grades": GRADES,
        "style": style,
        "script": script,
        # What stands between the tags is hashed, so the template must add nothing to it.
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "failed": sum(not gate["passed"] for gate in report.decision.gates),
        "gates": tables.gates(report.decision),
        "metrics": tables.metrics(report.evaluations, report.prompt),
        "signatures": dict(item for evaluation in report.evaluations.values() for item in evaluation.signatures.items()),
        "gain": _gain(report),
        "parts": [
            *(tables.labels(report.evaluations), tables.slices(report.evaluations, report.prompt)),
            *(tables.sets(report.evaluations, report.prompt), tables.probes(report.evaluations, report.prompt)),
        ],
        "flips": _or_why(lambda: _flips(report)),
        "sample": _or_why(lambda: _sample(report)),
        "given_out": {key: value for key, value in report.sample.to_json().items() if key != "rows"},
        "confusions": _or_why(lambda: _confusions(report)),
        "reliabilities": _or_why(lambda: _reliabilities(report)),
        "curves": _curves(report),
        "measured": tables.measured(report.measured),
        "checks": tables.checks(report.checks),
        "lineage": list(_lineage(report)),
        "airflow": report.trigger.url if report.trigger.url.startswith(("http://", "https://")) else "",
    }
    return _template().render(values)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("decision.html")


def _or_why(build: Callable[[], T]) -> T | str:
    """What a section shows, or why it cannot: a decision on frames that do not fit is a decision to be read all the same."""
    try:
        return build()
    except BadInputError as error:
        return str(error)


def _gain(report: Report) -> dict[str, Any] | None:
    found = report.decision.comparison
    if found is None or not all(math.isfinite(found[name]) for name in ("gain", "low", "high")):
        return None
    return {**found, "min_gain": report.prompt.promote.min_gain, "chart": gain_chart(found, report.prompt.promote.min_gain)}


def _flips(report: Report) -> dict[str, Any]:
    found: Flips = worst_flips(report.predictions[CANDIDATE], report.predictions[CHAMPION], report.prompt)
    rows = [_answered(report, flip.row, CLIPPED, flip.kind) for flip in found.listed]
    return {"found": found, "rows": rows, "generation": report.prompt.task == "generation"}


def _sample(report: Report) -> list[Answered]:
    """The rows as they are rated: the two outputs as A and B."""
    check_pair(report.predictions[CANDIDATE], report.predictions[CHAMPION], list(report.prompt.labels))
    places = {str(row): place for place, row in enumerate(report.predictions[CANDIDATE]["id"])}
    shown = []
    for row, first in report.sample.rows:
        if row in places:
            answered = _answered(report, places[row], CLIPPED_SAMPLE, first)
            outputs = answered.outputs if first == CANDIDATE else answered.outputs[::-1]
            shown.append(Answered(answered.id, answered.inputs, answered.references, outputs, first))
    return shown


def _answered(report: Report, place: int, clip: int, kind: str) -> Answered:
    """A row by its place in the predictions."""
    ours, theirs = (report.predictions[role].iloc[place] for role in PAIR)
    found = report.test[report.test["id"].astype(str) == str(ours["id"])]
    inputs = tuple((name, _clipped(found.iloc[0][name], clip)) for name in report.prompt.inputs if len(found))
    target = str(ours["target"])
    references = split_references(target) if report.prompt.task == "generation" else [target]
    said = tuple(_clipped(side["prediction"], clip) for side in (ours, theirs))
    return Answered(str(ours["id"]), inputs, tuple(_clipped(text, clip) for text in references), (said[0], said[1]), kind)


def _clipped(value: Any, most: int) -> str:
    text = "" if value is None or value != value else str(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _confusions(report: Report) -> list[dict[str, Any]]:
    """By role: the matrix, or for many labels the most frequent confusions."""
    labels = list(report.prompt.labels)
    shown: list[dict[str, Any]] = []
    for role in (CHAMPION, CANDIDATE) if labels else ():
        matrix = confusion(report.predictions[role], labels)
        columns = [*labels, "(other)"] if matrix[:, -1].any() else labels
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        if len(labels) <= MAX_MATRIX:
            rows = [
                (label, [(f"{matrix[i, j]:,}", f"{shares[i, j]:.3f}", i == j) for j in range(len(columns))])
                for i, label in enumerate(labels)
            ]
            shown.append({"title": ROLE_TITLES[role], "columns": columns, "rows": rows, "table": None})
        else:
            shown.append({"title": ROLE_TITLES[role], "table": _most_confused(matrix, [*labels, "(other)"], ROLE_TITLES[role])})
    return shown


def _most_confused(matrix: "np.ndarray", names: Sequence[str], title: str) -> Table:
    wrong = [(int(matrix[i, j]), i, j) for i, j in np.ndindex(matrix.shape) if i != j and matrix[i, j]]
    most = sorted(wrong, key=lambda item: (-item[0], item[1:]))[:MAX_MATRIX]
    rows = tuple((tables.Cell(names[i]), tables.Cell(names[j]), tables.Cell(f"{count:,}", "number")) for count, i, j in most)
    return Table(f"Most frequent confusions: {title}", ("reference", "predicted", "rows"), rows)


def _reliabilities(report: Report) -> list[dict[str, Any]]:
    shown = []
    for role in (CHAMPION, CANDIDATE) if report.prompt.labels else ():
        bins = reliability(report.predictions[role], list(report.prompt.labels))
        rows = tuple(
            (
                tables.Cell(f"{each.low:g} to {each.high:g}"),
                *(tables.Cell(text, "number") for text in (f"{each.rows:,}", f"{each.confidence:.4f}", f"{each.accuracy:.4f}")),
            )
            for each in bins
            if each.rows
        )
        title = f"Reliability of the {ROLE_TITLES[role]}"
        head = ("probability", "rows", "mean probability", "share right")
        if rows:
            shown.append({"title": title, "chart": reliability_chart(bins, title), "table": Table(title, head, rows)})
    return shown


def _curves(report: Report) -> dict[str, Any] | None:
    lines = {
        name: [(float(row["step"]), float(row["validation_loss"])) for row in rows if _finite(row.get("validation_loss"))]
        for name, rows in report.curves.items()
    }
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    best = {name: f"{min(loss for _, loss in line):.4f}" for name, line in lines.items()}
    return {"chart": curves_chart(lines, report.trial), "best": best}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _lineage(report: Report) -> Iterator[tuple[str, str]]:
    """Names and values of what the candidate came from."""
    lineage, trigger, model = report.lineage, report.trigger, report.prompt.base_model
    for role in tables.roles_of(report.evaluations):
        yield f"{ROLE_TITLES[role]}, release", report.evaluations[role].release
    yield "dataset revision", str(lineage.revision)
    yield "commit", f"{lineage.commit}{', with uncommitted changes' if lineage.dirty else ''}"
    yield "environment (sha256 of its lock file)", lineage.environment
    yield "base model", f"{model.hub} at {model.revision}" if model.hub else f"{model.path}, sha256 {model.sha256}"
    if lineage.overrides:
        yield "overrides", ", ".join(f"{key} = {value}" for key, value in sorted(lineage.overrides.items()))
    if report.trial:
        yield "trial", report.trial
    evaluation = report.evaluations[CANDIDATE]
    yield "test rows", f"{evaluation.rows:,}, sha256 of ids and references {evaluation.test_sha256}"
    yield "evaluation code (sha256)", evaluation.evaluator
    for stage, machine in sorted(lineage.machines.items()):
        yield f"machine of stage {stage}", ", ".join(f"{key} {value}" for key, value in sorted(machine.items()) if value not in (None, []))
    yield "DAG run", f"{trigger.dag_run_id} of {trigger.dag_id} ({trigger.run_type})"
    yield "MLflow run", report.sample.run
    yield "started by", trigger.by
    if trigger.reason:
        yield "reason", trigger.reason
