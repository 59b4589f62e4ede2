"""The last two tasks of `retrain_<prompt>`: the gate's decision, and the promotion that only a PROMOTE gets."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from retune.config import Prompt, Splits
from retune.errors import ConfigError, ConflictError, IntegrityError
from retune.evaluation.metrics import confusion
from retune.evaluation.plots import confusion_figure, per_class_figure, render, slices_figure
from retune.evaluation.report import decision_markdown
from retune.ledger import Entry, standing
from retune.promotion import Side
from retune.promotion import decide as gate
from retune.records import Decision, Evaluation, Lineage
from retune.tasks.context import Context, Json, champion_of, read_frame
from retune.tasks.release import read_release_record, register
from retune.tasks.retrain import evaluate_champion

__all__ = ["decide", "promote"]

ATTEMPTS = 5
"""How often a lost race for the ledger's head is decided again."""


def decide(run: Json, evaluated: list[Json]) -> Json:
    """The verdict of the gate, its evidence in MLflow, and for HOLD and REJECT the ledger entry.

    Raises ConflictError if other runs keep changing the champion. Retry: a decision already in the ledger is returned, not doubled.
    """
    context, run_id = Context.of(run), run["mlflow_run_id"]
    with context.tracker.closing(run_id, done=False):
        for _ in range(ATTEMPTS):
            entries = context.ledger.entries()
            if earlier := _recorded(entries, run):
                return {"verdict": earlier.body["decision"]["verdict"], "entry": earlier.n}
            judged = _judge(context, run, evaluated, entries)
            _show(context, run, judged)
            if judged["decision"]["verdict"] == "PROMOTE":
                return {"verdict": "PROMOTE", "judged": judged}
            try:
                entry = _append(context, run, judged, entries[-1])
            except ConflictError as lost:
                print(f"{lost}; deciding again")
                continue
            context.tracker.close(run_id)
            return {"verdict": judged["decision"]["verdict"], "entry": entry.n}
    raise ConflictError(f"the ledger of {context.prompt.name} changed {ATTEMPTS} times while this run decided; run it again")


def promote(run: Json, evaluated: list[Json], decided: Json) -> Json:
    """Registers the candidate, appends to the ledger, points the aliases at it, reads all of it back and predicts with it.

    If another run has changed the champion meanwhile, the gate decides anew, and may hold. Raises IntegrityError if something does not
    read back. Retry: creates nothing twice.
    """
    context, run_id = Context.of(run), run["mlflow_run_id"]
    candidate = _candidate(evaluated)
    lineage = Lineage.from_json(candidate["lineage"])
    with context.tracker.closing(run_id):
        if context.settings.require_clean and lineage.dirty:
            raise ConfigError(
                "the release was tuned from a checkout with uncommitted changes; commit them and retrain, or unset RETUNE_REQUIRE_CLEAN"
            )
        tags = {
            "retune.dag_run_id": run["trigger"]["dag_run_id"],
            "retune.dataset_revision": lineage.revision,
            "retune.commit": lineage.commit,
        }
        prompt = Prompt.model_validate(_release_prompt(context, lineage))
        version = register(context.registry, context.workspaces, prompt, lineage, candidate["mlflow_run_id"], tags)
        judged = decided.get("judged")
        for _ in range(ATTEMPTS):
            entries = context.ledger.entries()
            entry = _recorded(entries, run)
            if entry is None:
                if judged is None or champion_of(entries)["release"] != judged["champion_before"]["release"]:
                    print("the champion changed while this run evaluated: deciding again")
                    judged = _judge(context, run, evaluated, entries)
                    _show(context, run, judged)
                judged["candidate"]["version"] = version
                try:
                    entry = _append(context, run, judged, entries[-1])
                except ConflictError as lost:
                    print(f"{lost}; reading again")
                    continue
            break
        else:
            raise ConflictError(f"the ledger of {context.prompt.name} changed {ATTEMPTS} times while this run promoted; run it again")
        entries = context.ledger.entries()
        champion, previous = champion_of(entries), standing(entries).previous
        context.registry.project(champion["version"], previous["version"] if previous else None)
        if entry.kind == "promote" and champion["release"] == candidate["release"]:
            _smoke_test(context, lineage)
        context.tracker.tags(run_id, {"retune.version": version, "retune.ledger_entry": str(entry.n)})
    return {"verdict": entry.body["decision"]["verdict"], "entry": entry.n, "version": version, "release": candidate["release"]}


def _recorded(entries: list[Entry], run: Json) -> Entry | None:
    """This DAG run's own entry, from an earlier try."""
    mine = run["trigger"]["dag_run_id"]
    return next((e for e in reversed(entries) if e.kind != "found" and e.body.get("dag_run_id") == mine), None)


def _candidate(evaluated: list[Json]) -> Json:
    return next(e for e in evaluated if e["role"] == "candidate")


def _judge(context: Context, run: Json, evaluated: list[Json], entries: list[Entry]) -> Json:
    """Runs the gate against the ledger's champion of this moment; returns the body of the entry to come."""
    current = champion_of(entries)
    candidate = _candidate(evaluated)
    by_release = {e["release"]: e for e in evaluated}
    champion = by_release.get(current["release"]) or evaluate_champion(run, current)
    baseline = by_release.get(run["baseline"]["release"], champion)
    decision = gate(
        _side(context, candidate),
        _side(context, champion),
        context.prompt.promote,
        tuple(context.prompt.labels),
        barred=candidate["release"] in standing(entries).barred,
        same_release=candidate["release"] == champion["release"],
    )
    return {
        "decision": decision.to_json(),
        "candidate": {
            "release": candidate["release"],
            "version": None,
            "metrics": candidate["evaluation"]["metrics"],
            "trial": candidate["trial"],
        },
        "champion_before": {
            "release": champion["release"],
            "version": current["version"],
            "metrics": champion["evaluation"]["metrics"],
        },
        "baseline": {"release": baseline["release"], "metrics": baseline["evaluation"]["metrics"]},
        "lineage": candidate["lineage"],
        "evaluations": {
            "baseline": baseline["evaluation"],
            "champion": champion["evaluation"],
            "candidate": candidate["evaluation"],
        },
        "champion": current,
    }


def _side(context: Context, contender: Json) -> Side:
    lineage = Lineage.from_json(contender["lineage"])
    record = read_release_record(context.workspaces, context.prompt, lineage)
    predictions = read_frame(context, lineage, f"artifacts/{context.prompt.name}/predictions.parquet")
    splits = Splits.model_validate(record.splits) if record.splits else None
    return Side(Evaluation.from_json(contender["evaluation"]), predictions, splits, record.base_model)


def _release_prompt(context: Context, lineage: Lineage) -> Json:
    loaded: Json = yaml.safe_load(context.workspaces.read(lineage, f"artifacts/{context.prompt.name}/release/prompt.yaml"))
    return loaded


def _append(context: Context, run: Json, judged: Json, head: Entry) -> Entry:
    """The ledger's entry on this decision. A PROMOTE makes the candidate the champion."""
    decision = judged["decision"]
    body = {key: value for key, value in judged.items() if key != "evaluations"}
    body |= {
        "fingerprint": run["fingerprint"],
        "dag_run_id": run["trigger"]["dag_run_id"],
        "mlflow_run_id": run["mlflow_run_id"],
        "dataset_revision": judged["lineage"]["revision"],
        "rows": run["rows"],
        "triggered": run["trigger"],
    }
    if decision["verdict"] == "PROMOTE":
        lineage = Lineage.from_json(judged["lineage"])
        record = read_release_record(context.workspaces, context.prompt, lineage)
        body["champion"] = record.champion(judged["candidate"]["version"], judged["candidate"]["metrics"])
    return context.ledger.append(decision["verdict"].lower(), run["trigger"]["by"], decision["reasons"][0], _finite(body), head)


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that is no number becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(context: Context, run: Json, judged: Json) -> None:
    """The evidence in MLflow: verdict, metrics by role, plots, predictions."""
    run_id, prompt = run["mlflow_run_id"], context.prompt
    decision = Decision.from_json(judged["decision"])
    evaluations = {role: Evaluation.from_json(e) for role, e in judged["evaluations"].items()}
    context.tracker.tags(
        run_id, {"retune.verdict": decision.verdict, "retune.reasons": decision.reasons, "mlflow.note.content": "\n".join(decision.reasons)}
    )
    for role, evaluation in evaluations.items():
        prefix = "" if role == "candidate" else f"{role}_"
        context.tracker.metrics(run_id, {f"{prefix}{name}": value for name, value in evaluation.metrics.items() if value == value})
    if decision.comparison:
        context.tracker.metrics(
            run_id, {name: decision.comparison[name] for name in ("gain", "low", "high") if decision.comparison[name] is not None}
        )
    context.tracker.params(run_id, {"candidate_trial": judged["candidate"]["trial"]["name"]})
    markdown = decision_markdown(decision, evaluations, prompt)
    print(markdown)
    context.tracker.text(run_id, markdown, "decision/decision.md")
    context.tracker.json(run_id, decision.to_json(), "decision/decision.json")
    predictions = read_frame(context, Lineage.from_json(judged["lineage"]), f"artifacts/{prompt.name}/predictions.parquet")
    context.tracker.table(run_id, predictions, "predictions.json")
    with tempfile.TemporaryDirectory(prefix="retune-plots-") as scratch:
        path = Path(scratch) / "predictions.parquet"
        predictions.to_parquet(path, index=False)
        context.tracker.file(run_id, path)
        figures = {}
        if prompt.labels:
            labels = list(prompt.labels)
            matrix = confusion(predictions, labels)
            figures["confusion_matrix"] = confusion_figure(matrix, labels, f"{prompt.name}: candidate on the test split")
            figures["classes"] = per_class_figure(evaluations)
        if prompt.slices:
            least = prompt.promote.min_slice_rows
            figures["slices"] = slices_figure(evaluations["champion"], evaluations["candidate"], prompt.promote.metric, least)
        for name, figure in figures.items():
            context.tracker.figure(run_id, render(figure), f"decision/{name}.png", Path(scratch))


def _smoke_test(context: Context, lineage: Lineage) -> None:
    """Predicts some test rows with `models:/<prompt>@champion` and compares with the pipeline's own predictions."""
    place = f"artifacts/{context.prompt.name}"
    test = read_frame(context, lineage, f"{place}/dataset/test.parquet").head(8)
    expected = read_frame(context, lineage, f"{place}/predictions.parquet").head(8)
    got = context.registry.predict("champion", test[list(context.prompt.inputs)].reset_index(drop=True), context.settings.base_models)
    if list(got["prediction"]) != list(expected["prediction"]):
        raise IntegrityError(
            f"models:/{context.prompt.name}@champion answers {list(got['prediction'])} where the pipeline answered "
            f"{list(expected['prediction'])}; look at the version's requirements, then `retune rollback` if it serves"
        )
    scores = [column for column in expected.columns if column.startswith("p_")]
    pd.testing.assert_frame_equal(got[scores].reset_index(drop=True), expected[scores], check_exact=False, atol=1e-4)
