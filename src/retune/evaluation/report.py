"""A decision as Markdown, for MLflow's run description, the task log, chat and a pull request."""

from collections.abc import Iterable, Mapping, Sequence

from retune.config import Prompt
from retune.evaluation import tables
from retune.evaluation.roles import ROLE_TITLES
from retune.evaluation.tables import Cell, Table, roles_of
from retune.records import CheckResult, Decision, Evaluation, Measured, Trigger

__all__ = ["decision_markdown", "markdown_table", "markdown_text", "measured_on", "run_note"]


def decision_markdown(
    decision: Decision,
    evaluations: Mapping[str, Evaluation],
    prompt: Prompt,
    measured: Mapping[str, Measured] | None = None,
    checks: Sequence[CheckResult] | None = None,
) -> str:
    """Verdict and reasons first, then metrics by role, gates, labels, slices and whatever else was found. The same input gives the same
    text.

    `evaluations`, `measured`: role (`retune.evaluation.roles`) -> what was found; a role that is absent has no column.
    """
    parts = [
        f"# {prompt.name}: {decision.verdict}",
        "\n".join(f"- {markdown_text(reason)}" for reason in decision.reasons) or "- No reason was recorded.",
        "## Metrics",
        markdown_table(tables.metrics(evaluations, prompt)),
        measured_on(evaluations),
    ]
    found = [
        tables.gates(decision),
        tables.labels(evaluations),
        tables.slices(evaluations, prompt),
        tables.sets(evaluations, prompt),
        tables.probes(evaluations, prompt),
        tables.measured(measured or {}),
        tables.checks(checks),
    ]
    for table in found:
        if table.rows:
            parts += [f"## {table.title}", markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def run_note(decision: Decision, trigger: Trigger) -> str:
    """The description of a DAG run's MLflow run: verdict and reasons, who started it and why, and the way back to Airflow."""
    name = markdown_text(trigger.dag_run_id)
    started = f"[DAG run {name}]({trigger.url})" if trigger.url else f"DAG run {name}"
    why = f": {markdown_text(trigger.reason)}" if trigger.reason else ""
    reasons = (markdown_text(reason) for reason in decision.reasons)
    return "\n\n".join([f"**{decision.verdict}**", *reasons, f"{started}, by {markdown_text(trigger.by)}{why}"])


def measured_on(evaluations: Mapping[str, Evaluation]) -> str:
    """On how many rows which releases were measured, and how."""
    roles = roles_of(evaluations)
    releases = ", ".join(f"{ROLE_TITLES[role]} `{evaluations[role].release[:12]}`" for role in roles)
    rows = sorted({evaluations[role].rows for role in roles})
    signatures = dict.fromkeys(f"{name} `{text}`" for role in roles for name, text in evaluations[role].signatures.items())
    computed = f" sacreBLEU: {', '.join(signatures)}." if signatures else ""
    return f"On {' / '.join(f'{count:,}' for count in rows)} test rows: {releases}.{computed}"


def markdown_table(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([line(table.head), line(["---"] * len(table.head)), *(line(map(_cell, row)) for row in table.rows)])


def _cell(cell: Cell) -> str:
    text = markdown_text(cell.text)
    return f"**{text}**" if cell.form in ("strong", "failed") else text


def markdown_text(value: str) -> str:
    """Text from data as plain Markdown text on one line: no table cell, tag, image or link of its own."""
    escaped = " ".join(value.split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "|[]`*":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped
