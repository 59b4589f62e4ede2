"""The last two tasks of `retrain_<prompt>`: the gate's decision, and the promotion that only a PROMOTE gets."""

import math
import tempfile
from pathlib import Path
from typing import Any

from retune.config import Prompt, Splits, override, parse_yaml, sha256_json
from retune.data.parts import BUCKETS
from retune.errors import ConfigError, ConflictError
from retune.evaluation.metrics import confusion
from retune.evaluation.plots import confusion_figure, per_class_figure, render, slices_figure
from retune.evaluation.report import decision_markdown, run_note
from retune.evaluation.roles import CANDIDATE, FEW_SHOT
from retune.ledger import Entry, spent_before, standing
from retune.promotion import Side, with_answer
from retune.promotion import decide as gate
from retune.records import CheckResult, Decision, Evaluation, Lineage, Trigger
from retune.registry import CHAMPION
from retune.tasks.context import Context, Json, champion_of, read_frame
from retune.tasks.measure import check_results, measure, measured_of
from retune.tasks.page import REPORT, log_page
from retune.tasks.patch import log_patch
from retune.tasks.release import read_release_record, register, smoke_test
from retune.tasks.retrain import evaluate_champion

__all__ = ["decide", "look_of", "promote"]

ATTEMPTS = 5
"""How often a lost race for the ledger's head is decided again."""


def decide(run: Json, evaluated: list[Json], measured: Json) -> Json:
    """The verdict of the gate, its evidence in MLflow, and for HOLD and REJECT the ledger entry.

    Raises ConflictError if other runs keep changing the champion. Retry: a decision already in the ledger is returned, not doubled.
    """
    context, run_id = Context.of(run), run["mlflow_run_id"]
    links = {"Report": context.run_link(run_id, REPORT)}
    with context.tracker.working(run_id):
        context.tracker.tags(_candidate(evaluated)["mlflow_run_id"], {"retune.selected": "true"})
        for _ in range(ATTEMPTS):
            entries = context.ledger.entries()
            if earlier := _recorded(entries, run):
                return {"verdict": earlier.body["decision"]["verdict"], "entry": earlier.n, "ask": False, "links": links}
            judged = _judge(context, run, evaluated, measured, entries)
            if run["patch"]:
                log_patch(context, run_id, Lineage.from_json(judged["lineage"]))
            summary = _show(context, run, judged)
            if judged["decision"]["verdict"] == "PROMOTE":
                return {
                    "verdict": "PROMOTE",
                    "judged": judged,
                    "ask": run["approval"] or judged["decision"]["ask"],
                    "summary": summary,
                    "links": links,
                }
            try:
                entry = _append(context, run, judged, entries[-1])
            except ConflictError as lost:
                print(f"{lost}; deciding again")
                continue
            context.tracker.close(run_id)
            return {"verdict": judged["decision"]["verdict"], "entry": entry.n, "ask": False, "links": links}
    raise ConflictError(f"the ledger of {context.prompt.name} changed {ATTEMPTS} times while this run decided; run it again")


def promote(run: Json, evaluated: list[Json], measured: Json, decided: Json, answer: Json | None = None) -> Json:
    """Registers the candidate, appends to the ledger, points the aliases at it, reads all of it back and predicts with it.

    `answer`: what the person said, where the run asked one; anything but an approval is entered as a HOLD. If another run has changed the
    champion meanwhile, the gate decides anew, and may hold; what a person approved is held then. Raises IntegrityError if something does
    not read back. Retry: creates nothing twice.
    """
    context, run_id = Context.of(run), run["mlflow_run_id"]
    candidate = _candidate(evaluated)
    lineage = Lineage.from_json(candidate["lineage"])
    with context.tracker.working(run_id, done=True):
        if context.settings.require_clean and lineage.dirty:
            raise ConfigError(
                "the release was tuned from a checkout with uncommitted changes; commit them and retrain, or unset RETUNE_REQUIRE_CLEAN"
            )
        judged = decided.get("judged", {})  # nothing where the run was decided before, and is done again: its entry is found below
        if decided["ask"]:
            judged = _answered(context, run, judged, *_verdict_of(answer, context.prompt))
        for _ in range(ATTEMPTS):
            entries = context.ledger.entries()
            if entry := _recorded(entries, run):
                break
            champion = champion_of(entries)
            if champion["release"] != judged["champion_before"]["release"]:
                print("the champion changed while this run evaluated: deciding again")
                if decided["ask"]:
                    changed = f"The champion is version {champion['version']} by now, which is not what was asked about; run again."
                    judged = _answered(context, run, judged, False, changed)
                else:
                    judged = _judge(context, run, evaluated, measured, entries)
                    if judged["decision"]["ask"]:
                        judged = _answered(context, run, judged, False, "This must be approved, and nobody was asked; run again.")
                    _show(context, run, judged)
            if judged["decision"]["verdict"] == "PROMOTE":
                judged["candidate"]["version"] = _register(context, run, judged, candidate)
            try:
                entry = _append(context, run, judged, entries[-1])
            except ConflictError as lost:
                print(f"{lost}; reading again")
                continue
            break
        else:
            raise ConflictError(f"the ledger of {context.prompt.name} changed {ATTEMPTS} times while this run promoted; run it again")
        context.tracker.tags(run_id, {"retune.ledger_entry": str(entry.n)})
        verdict, version = entry.body["decision"]["verdict"], entry.body["candidate"]["version"]
        result = {"verdict": verdict, "entry": entry.n, "reason": entry.reason, "links": {"Report": context.run_link(run_id, REPORT)}}
        if verdict != "PROMOTE":
            return result
        entries = context.ledger.entries()
        champion, previous = champion_of(entries), standing(entries).previous
        context.registry.project(champion["version"], previous["version"] if previous else None)
        if champion["release"] == candidate["release"]:
            smoke_test(context, entries, candidate["release"], f"@{CHAMPION}")
        context.tracker.tags(run_id, {"retune.version": version})
    result["links"]["Release"] = context.release_link(version)
    return {**result, "version": version, "release": candidate["release"]}


def _verdict_of(answer: Json | None, prompt: Prompt) -> tuple[bool, str]:
    """Whether a person approved, and the sentence for the ledger."""
    if answer is None or answer["by"] is None:
        return False, f"Nobody approved the promotion within {prompt.promote.approval_hours:g} h."
    said = f": {answer['comment']}" if answer["comment"] else "."
    if answer["chosen"] != "Approve":
        return False, f"{answer['by']} did not approve the promotion{said}"
    return True, f"Approved by {answer['by']}{said}"


def _answered(context: Context, run: Json, judged: Json, approved: bool, reason: str) -> Json:
    """The decision with the person's answer in it, also where MLflow shows it."""
    answered = {**judged, "decision": with_answer(Decision.from_json(judged["decision"]), approved, reason).to_json()}
    _show(context, run, answered)
    return answered


def _register(context: Context, run: Json, judged: Json, candidate: Json) -> str:
    """Version of the candidate in MLflow's registry, with its metrics, lineage and card on its page."""
    lineage = Lineage.from_json(candidate["lineage"])
    tags = {
        "retune.dag_run_id": run["trigger"]["dag_run_id"],
        "retune.airflow_url": run["trigger"]["url"],
        "retune.dataset_revision": lineage.revision,
        "retune.commit": lineage.commit,
        "retune.dirty": str(lineage.dirty).lower(),
        "retune.base_model": context.prompt.base_model.hub or context.prompt.base_model.path or "",
    }
    from retune.evaluation.card import release_card  # brings huggingface_hub, which a decision without a promotion can do without

    prompt = Prompt.model_validate(_release_prompt(context, lineage))
    version = register(context.registry, context.workspaces, prompt, lineage, candidate["mlflow_run_id"], tags)
    metrics = {name: value for name, value in candidate["evaluation"]["metrics"].items() if math.isfinite(value)}
    evaluations = {role: Evaluation.from_json(e) for role, e in judged["evaluations"].items()}
    tuned = override(context.prompt, candidate["trial"]["overrides"])
    card = release_card(Decision.from_json(judged["decision"]), evaluations, tuned, lineage, Trigger.from_json(run["trigger"]))
    context.tracker.metrics(candidate["mlflow_run_id"], metrics, context.registry.describe(version, card))
    return version


def _recorded(entries: list[Entry], run: Json) -> Entry | None:
    """This DAG run's own decision on these inputs, from an earlier try."""
    mine = run["trigger"]["dag_run_id"]
    same = (e for e in reversed(entries) if e.body.get("dag_run_id") == mine and e.body.get("fingerprint") == run["fingerprint"])
    return next(same, None)


def _candidate(evaluated: list[Json]) -> Json:
    return next(e for e in evaluated if e["role"] == "candidate")


def _judge(context: Context, run: Json, evaluated: list[Json], measured: Json, entries: list[Entry]) -> Json:
    """Runs the gate against the ledger's champion of this moment; returns the body of the entry to come."""
    current = champion_of(entries)
    candidate = _candidate(evaluated)
    by_release = {e["release"]: e for e in evaluated}
    champion = by_release.get(current["release"]) or evaluate_champion(run, current)
    baseline = by_release.get(run["baseline"]["release"], champion)
    few_shot = {FEW_SHOT: by_release[candidate["few_shot"]]} if candidate["few_shot"] else {}
    if measured["champion"] != champion["release"]:
        measured = measure(run, evaluated, champion)
    checks = check_results(run, measured)
    policy = context.prompt.promote
    ours = _side(context, candidate)
    look = look_of(ours, champion["release"], context.prompt)
    decision = gate(
        ours,
        _side(context, champion),
        policy,
        tuple(context.prompt.labels),
        barred=candidate["release"] in standing(entries).barred,
        same_release=candidate["release"] == champion["release"],
        spent=spent_before(entries, look),
        measured=measured_of(measured),
        checks=checks,
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
        **{role: {"release": e["release"], "metrics": e["evaluation"]["metrics"]} for role, e in few_shot.items()},
        "lineage": candidate["lineage"],
        "evaluations": {
            "baseline": baseline["evaluation"],
            **{role: e["evaluation"] for role, e in few_shot.items()},
            "champion": champion["evaluation"],
            "candidate": candidate["evaluation"],
        },
        "measured": measured["measured"],
        "checks": None if checks is None else [result.to_json() for result in checks],
        "lineages": {"champion": champion["lineage"], "candidate": candidate["lineage"]},
        "champion": current,
        "look": None if candidate["release"] == champion["release"] else look,
    }


def look_of(candidate: Side, champion: str, prompt: Prompt) -> Json:
    """What is compared on which test split, by hash, and the chance of luck that it takes. The same again is no second look.

    A test split is what its rows follow from: where it begins among the buckets, and the salt. It grows with the data.
    """
    found, policy = candidate.evaluation, prompt.promote
    splits = candidate.splits or prompt.preprocess.splits
    return {
        "split": sha256_json([round((splits.train + splits.validation) * BUCKETS), splits.salt]),
        "comparison": sha256_json([found.release, champion, found.test_sha256, found.evaluator, policy.metric]),
        "takes": 1 - policy.look_confidence,
    }


def _side(context: Context, contender: Json) -> Side:
    lineage = Lineage.from_json(contender["lineage"])
    record = read_release_record(context.workspaces, context.prompt, lineage)
    predictions = read_frame(context, lineage, f"artifacts/{context.prompt.name}/predictions.parquet")
    probes = read_frame(context, lineage, f"artifacts/{context.prompt.name}/probes.parquet")
    splits = Splits.model_validate(record.splits) if record.splits else None
    return Side(Evaluation.from_json(contender["evaluation"]), predictions, splits, record.base_model, probes)


def _release_prompt(context: Context, lineage: Lineage) -> Json:
    place = f"artifacts/{context.prompt.name}/release/prompt.yaml"
    loaded: Json = parse_yaml(context.workspaces.read(lineage, place), place)
    return loaded


def _append(context: Context, run: Json, judged: Json, head: Entry) -> Entry:
    """The ledger's entry on this decision. A PROMOTE makes the candidate the champion."""
    decision = judged["decision"]
    body = {key: value for key, value in judged.items() if key not in ("evaluations", "lineages")}
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


def _show(context: Context, run: Json, judged: Json) -> str:
    """The evidence in MLflow: verdict, metrics by role, plots, predictions. Returns the report."""
    run_id, prompt = run["mlflow_run_id"], context.prompt
    decision = Decision.from_json(judged["decision"])
    evaluations = {role: Evaluation.from_json(e) for role, e in judged["evaluations"].items()}
    context.tracker.tags(
        run_id,
        {
            "retune.verdict": decision.verdict,
            "retune.reasons": decision.reasons,
            "mlflow.note.content": run_note(decision, Trigger.from_json(run["trigger"])),
        },
    )
    figures = {
        f"{'' if role == CANDIDATE else f'{role}_'}{name}": value for role, e in evaluations.items() for name, value in e.metrics.items()
    }
    sets = evaluations[CANDIDATE].sets
    figures |= {
        f"{kind}/{name}": found[kind] for name, found in sets.items() for kind in (prompt.promote.metric, "changed") if kind in found
    }
    figures |= {name: decision.comparison[name] for name in ("gain", "low", "high")} if decision.comparison else {}
    figures |= {
        f"{role}_{name}": value for role, record in judged["measured"].items() for name, value in record.items() if value is not None
    }
    context.tracker.metrics(run_id, {name: value for name, value in figures.items() if math.isfinite(value)})
    trial = judged["candidate"]["trial"]
    tuned = override(prompt, trial["overrides"]).tune.model_dump(mode="json")
    context.tracker.params(run_id, {"candidate_trial": trial["name"], "tune": tuned, "rows": run["rows"]})
    checks = None if judged["checks"] is None else [CheckResult.from_json(result) for result in judged["checks"]]
    markdown = decision_markdown(decision, evaluations, prompt, measured_of(judged), checks)
    print(markdown)
    context.tracker.text(run_id, markdown, "decision/decision.md")
    context.tracker.json(run_id, decision.to_json(), "decision/decision.json")
    if judged["checks"] is not None:
        context.tracker.json(run_id, {"checks": judged["checks"]}, "decision/checks.json")
    log_page(context, run, judged, measured_of(judged), checks)
    predictions = read_frame(context, Lineage.from_json(judged["lineage"]), f"artifacts/{prompt.name}/predictions.parquet")
    context.tracker.table(run_id, predictions, "predictions.json")
    with tempfile.TemporaryDirectory(prefix="retune-plots-") as scratch:
        path = Path(scratch) / "predictions.parquet"
        predictions.to_parquet(path, index=False)
        context.tracker.file(run_id, path)
        plots = {}
        if prompt.labels:
            labels = list(prompt.labels)
            matrix = confusion(predictions, labels)
            plots["confusion_matrix"] = confusion_figure(matrix, labels, f"{prompt.name}: candidate on the test split")
            plots["classes"] = per_class_figure(evaluations)
        if prompt.slices:
            least = prompt.promote.min_slice_rows
            plots["slices"] = slices_figure(evaluations["champion"], evaluations["candidate"], prompt.promote.metric, least)
        for name, figure in plots.items():
            context.tracker.figure(run_id, render(figure), f"decision/{name}.png", Path(scratch))
    return markdown
