"""A decision's page among the artifacts of the DAG run's MLflow run, and the sample of outputs that it asks a person to rate."""

from collections.abc import Mapping, Sequence

from retune.evaluation.page import Report, decision_page
from retune.evaluation.sample import Sample
from retune.records import CheckResult, Decision, Evaluation, Lineage, Measured, Trigger
from retune.tasks.context import Context, Json, read_frame

__all__ = ["REPORT", "SAMPLE", "log_page"]

REPORT = "decision/report.html"
"""Verdict, evidence and sample, for a browser."""
SAMPLE = "decision/sample.json"
"""Rows of the sample and whose output is A there: what `retune rate` holds a file of ratings to."""


def log_page(
    context: Context,
    run: Json,
    judged: Json,
    measured: Mapping[str, Measured] | None = None,
    checks: Sequence[CheckResult] | None = None,
) -> None:
    """`run`: of task resolve. `judged`: decision, evaluations and lineages by role. `measured`: role -> what was timed."""
    run_id, place = run["mlflow_run_id"], f"artifacts/{context.prompt.name}"
    lineages = {role: Lineage.from_json(lineage) for role, lineage in judged["lineages"].items()}
    evaluations = {role: Evaluation.from_json(evaluation) for role, evaluation in judged["evaluations"].items()}
    predictions = {role: read_frame(context, lineage, f"{place}/predictions.parquet") for role, lineage in lineages.items()}
    test = read_frame(context, lineages["candidate"], f"{place}/dataset/test.parquet")
    releases = {role: evaluation.release for role, evaluation in evaluations.items()}
    sample = Sample.draw(context.prompt.name, run_id, releases, list(test["id"]))
    report = Report(
        prompt=context.prompt,
        decision=Decision.from_json(judged["decision"]),
        evaluations=evaluations,
        predictions=predictions,
        test=test,
        lineage=lineages["candidate"],
        trigger=Trigger.from_json(run["trigger"]),
        sample=sample,
        curves=context.tracker.curves(run_id),
        trial=judged["candidate"]["trial"]["name"],
        measured=measured or {},
        checks=checks,
    )
    context.tracker.text(run_id, decision_page(report), REPORT)
    context.tracker.json(run_id, sample.to_json(), SAMPLE)
