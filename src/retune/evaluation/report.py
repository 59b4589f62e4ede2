"""A decision as Markdown, for MLflow's run description, the task log and a pull request."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retune.config import Prompt
from retune.evaluation.metrics import task_metrics
from retune.evaluation.roles import CANDIDATE, CHAMPION, ROLE_TITLES
from retune.records import CheckResult, Decision, Evaluation, Lineage, Measured, Trigger

__all__ = ["MEASURED", "decision_markdown", "release_card", "run_note"]

MEASURED = {
    "latency_p50_ms": ("prediction, median", "ms, one row at a time"),
    "latency_p95_ms": ("prediction, 95th percentile", "ms, one row at a time"),
    "tokens_per_second": ("tokens", "per second, input and output"),
    "tuned_parameters": ("tuned values", "numbers"),
    "tune_seconds": ("tuning", "s, on the machine that executed it"),
    "cost": ("cost of tuning", "at RETUNE_DEVICE_HOUR_PRICE"),
}
"""Field of a `Measured` -> its title and unit, in the order of tables."""


def decision_markdown(
    decision: Decision,
    evaluations: Mapping[str, Evaluation],
    prompt: Prompt,
    measured: Mapping[str, Measured] | None = None,
    checks: Sequence[CheckResult] | None = None,
) -> str:
    """Verdict and reasons first, then metrics by role, gates, checks, time and cost, labels and slices. Holds no date: the same input
    gives the same text.

    `evaluations`: role (`retune.evaluation.roles`) -> evaluation; a role that is absent has no column. `measured`: likewise.
    """
    roles = [role for role in ROLE_TITLES if role in evaluations]
    parts = [
        f"# {prompt.name}: {decision.verdict}",
        "\n".join(f"- {_text(reason)}" for reason in decision.reasons) or "- No reason was recorded.",
        "## Metrics",
        _metrics(evaluations, roles, prompt),
        _measured(evaluations, roles),
        "## Gates",
        _gates(decision.gates),
    ]
    if checks is not None:
        parts += ["## Checks", _checks(checks)]
    if measured:
        parts += ["## Time and cost", _time_and_cost(measured)]
    if any(evaluations[role].per_class for role in roles):
        parts += ["## F1 by label", _labels(evaluations, roles)]
    if any(evaluations[role].slices for role in roles):
        parts += [f"## {prompt.promote.metric} by slice", _slices(evaluations, roles, prompt)]
    if any(evaluations[role].sets for role in roles):
        parts += [f"## {prompt.promote.metric} of labelled sets and probes", _sets(evaluations, roles, prompt.promote.metric)]
    return "\n\n".join(parts) + "\n"


def run_note(decision: Decision, trigger: Trigger) -> str:
    """The description of a DAG run's MLflow run: verdict and reasons, who started it and why, and the way back to Airflow."""
    started = f"[DAG run {_text(trigger.dag_run_id)}]({trigger.url})" if trigger.url else f"DAG run {_text(trigger.dag_run_id)}"
    why = f": {_text(trigger.reason)}" if trigger.reason else ""
    return "\n\n".join(
        [f"**{decision.verdict}**", *(_text(reason) for reason in decision.reasons), f"{started}, by {_text(trigger.by)}{why}"]
    )


def release_card(decision: Decision, evaluations: Mapping[str, Evaluation], prompt: Prompt, lineage: Lineage, trigger: Trigger) -> str:
    """The description of a promoted version: what it is for, how good it is, what it came from, how to load and how to leave it."""
    roles = [role for role in ROLE_TITLES if role in evaluations]
    model = prompt.base_model
    base = f"{model.hub} at {model.revision}" if model.hub else f"{model.path}, sha256 {model.sha256}"
    code = f"commit `{lineage.commit[:12]}`{' with uncommitted changes' if lineage.dirty else ''}"
    use = [("Intended use", prompt.intended_use), ("Owner", prompt.owner)]
    return "\n\n".join(
        [
            f"# {prompt.name}",
            _text(prompt.description) or "No description.",
            *(f"**{title}**: {_text(text)}" for title, text in use if text),
            "\n".join(f"- {_text(reason)}" for reason in decision.reasons),
            "## Metrics on the test split",
            _metrics(evaluations, roles, prompt),
            _measured(evaluations, roles),
            "## Lineage",
            "\n".join(
                [
                    f"- Release `{evaluations[CANDIDATE].release}`",
                    f"- Dataset revision {lineage.revision}, {code}, environment `{lineage.environment[:12]}`",
                    f"- Base model {_text(base)}",
                    f"- {f'[DAG run {_text(trigger.dag_run_id)}]({trigger.url})' if trigger.url else _text(trigger.dag_run_id)}, "
                    f"by {_text(trigger.by)}",
                ]
            ),
            "## Use",
            f'`mlflow.pyfunc.load_model("models:/{prompt.name}@champion")` loads the champion; `retune rollback {prompt.name}` leaves it, '
            f"`retune reproduce {prompt.name} --release {evaluations[CANDIDATE].release[:12]}` builds this release again.",
        ]
    )


def _metrics(evaluations: Mapping[str, Evaluation], roles: Sequence[str], prompt: Prompt) -> str:
    rows = []
    for metric in task_metrics(prompt.task):
        name = f"**{metric.name}**" if metric.name == prompt.promote.metric else metric.name
        better = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
        rows.append([name, *(_number(evaluations[role].metrics.get(metric.name)) for role in roles), better, metric.unit])
    return _table(["metric", *(ROLE_TITLES[role] for role in roles), "better", "unit"], rows)


def _measured(evaluations: Mapping[str, Evaluation], roles: Sequence[str]) -> str:
    releases = ", ".join(f"{ROLE_TITLES[role]} `{evaluations[role].release[:12]}`" for role in roles)
    rows = sorted({evaluations[role].rows for role in roles})
    signatures = dict.fromkeys(f"{name} `{text}`" for role in roles for name, text in evaluations[role].signatures.items())
    computed = f" sacreBLEU: {', '.join(signatures)}." if signatures else ""
    return f"On {' / '.join(f'{count:,}' for count in rows)} test rows: {releases}.{computed}"


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for gate in gates:
        outcome = "passed" if gate["passed"] else f"**failed: {gate['on_fail']}**"
        interval = "" if gate["low"] is None else f"{_number(gate['low'])} to {_number(gate['high'])}"
        rows.append([gate["name"], outcome, _optional(gate["value"]), interval, _optional(gate["threshold"]), _text(gate["reason"])])
    return _table(["gate", "outcome", "value", "interval", "threshold", "reason"], rows)


def _checks(checks: Sequence[CheckResult]) -> str:
    rows = []
    for check in checks:
        outcome = "passed" if check.passed else "**failed**" if check.required else "failed, reported only"
        rows.append([_text(check.name), "yes" if check.required else "no", outcome, _text(check.reason)])
    return _table(["check", "required", "outcome", "reason"], rows)


def _time_and_cost(measured: Mapping[str, Measured]) -> str:
    roles = [role for role in ROLE_TITLES if role in measured]
    rows = [[title, *(_thousands(getattr(measured[role], name)) for role in roles), unit] for name, (title, unit) in MEASURED.items()]
    return _table(["figure", *(ROLE_TITLES[role] for role in roles), "unit"], rows)


def _labels(evaluations: Mapping[str, Evaluation], roles: Sequence[str]) -> str:
    labels = dict.fromkeys(label for role in roles for label in evaluations[role].per_class)
    rows = []
    for label in labels:
        figures = [evaluations[role].per_class.get(label, {}) for role in roles]
        rows.append([_text(label), _count(figures), *(_number(values.get("f1")) for values in figures)])
    return _table(["label", "rows", *(ROLE_TITLES[role] for role in roles)], rows)


def _slices(evaluations: Mapping[str, Evaluation], roles: Sequence[str], prompt: Prompt) -> str:
    metric, policy = prompt.promote.metric, prompt.promote
    names = dict.fromkeys((column, value) for role in roles for column, values in evaluations[role].slices.items() for value in values)
    rows = []
    for column, value in names:
        figures = {role: evaluations[role].slices.get(column, {}).get(value, {}) for role in roles}
        few = figures.get(CANDIDATE, {}).get("rows", 0) < policy.min_slice_rows
        guarded = "no: max_slice_gap not set" if policy.max_slice_gap is None else "no: too few rows" if few else "yes"
        change = _change(figures.get(CHAMPION, {}).get(metric), figures.get(CANDIDATE, {}).get(metric))
        shown = [_number(values.get(metric)) for values in figures.values()]
        rows.append([_text(f"{column}={value}"), _count(figures.values()), *shown, change, guarded])
    return _table(["slice", "rows", *(ROLE_TITLES[role] for role in roles), "change", "guarded"], rows)


def _sets(evaluations: Mapping[str, Evaluation], roles: Sequence[str], metric: str) -> str:
    """A probe's last column: answers of the last role that are not those of the unchanged rows."""
    rows = []
    for name in dict.fromkeys(name for role in roles for name in evaluations[role].sets):
        figures = [evaluations[role].sets.get(name, {}) for role in roles]
        changed = figures[-1].get("changed")
        shown = [_number(values.get(metric)) for values in figures]
        rows.append([_text(name), _count(figures), *shown, "" if changed is None else f"{changed:.1%}"])
    return _table(["set", "rows", *(ROLE_TITLES[role] for role in roles), "answers changed"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count(figures: Iterable[Mapping[str, float]]) -> str:
    """Rows, as far as the roles agree."""
    return " / ".join(f"{rows:,.0f}" for rows in sorted({values["rows"] for values in figures if "rows" in values}))


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"


def _thousands(value: float | None) -> str:
    return "not known" if value is None or not math.isfinite(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after - before:+.4f}"


def _text(value: str) -> str:
    """Text from data as plain Markdown text on one line: no table cell, tag, image or link of its own."""
    escaped = " ".join(value.split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "|[]`*":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped
