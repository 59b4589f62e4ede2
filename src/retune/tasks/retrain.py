"""The tasks of `retrain_<prompt>`, in their order. Each takes what the earlier ones returned (XCom) and may be retried.

`run` is what the first task pinned: the resolved prompt, the lineage, the champion, the MLflow run. No later task looks at the dataset
ledger's head again, so that all of a run sees one revision.
"""

import io
import json
from datetime import UTC, datetime

import pandas as pd
import yaml

from retune.config import Prompt, load_prompt, override, sha256_json
from retune.errors import BadInputError, ConfigError, ConflictError
from retune.ledger import Entry, Ledger, decided
from retune.records import Lineage
from retune.settings import Settings
from retune.tasks.context import Context, Json, Trigger, champion_of, read_frame
from retune.tasks.release import read_release_record, register

__all__ = ["evaluate", "evaluate_champion", "fingerprint", "plan", "preprocess", "resolve", "select", "tune"]


def fingerprint(context: Context, lineage: Lineage) -> str:
    """Hash of everything that a retrain run's verdict follows from, the champion apart: promotion must not cause the next run."""
    science = ("task", "base_model", "template", "target", "labels", "slices", "preprocess", "tune", "generation", "trials", "promote")
    fields = context.prompt.model_dump(mode="json")
    return sha256_json(
        {
            "data": context.workspaces.data_hash(lineage, context.prompt.name),
            "prompt": {name: fields[name] for name in science},
            "code": context.workspaces.code_hash(context.prompt),
        }
    )


def resolve(name: str, trigger: Trigger) -> Json | None:
    """Pins revision, prompt and champion for the run; None if there is nothing to do, which the log explains.

    Raises ConfigError on a wrong override, BadInputError when a person asks for a run without data. Retry: safe.
    """
    settings = Settings.load()
    prompt = override(load_prompt(settings.prompts / f"{name}.yaml"), trigger.overrides)
    context = Context.load(prompt)
    head = Ledger(context.workspaces.store, "dataset").head()
    rows = head.body["rows"].get(name, 0) if head else 0
    if head is None or not rows:
        missing = f"no data of {name} yet: land files in {prompt.source.path}, then run the DAG `ingest`"
        if trigger.run_type == "manual":
            raise BadInputError(missing)
        print(missing)
        return None
    lineage = context.workspaces.lineage(head.body["data"], head.n, trigger.overrides)
    mark = fingerprint(context, lineage)
    entries = context.ledger.entries()
    if nothing := _nothing_to_do(prompt, trigger, decided(entries, mark), entries, rows):
        print(nothing)
        return None
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    run_id = context.tracker.open(
        trigger.dag_run_id,
        f"revision {head.n} · {trigger.run_type} {started}",
        {
            "retune.dag_run_id": trigger.dag_run_id,
            "retune.dag_id": f"retrain_{name}",
            "retune.triggered_by": trigger.by,
            "retune.run_type": trigger.run_type,
            "retune.reason": trigger.reason,
            "retune.dataset_revision": str(head.n),
            "retune.fingerprint": mark,
            "retune.commit": lineage.commit,
            "retune.dirty": str(lineage.dirty).lower(),
            "retune.environment": lineage.environment,
        },
    )
    with context.tracker.closing(run_id, done=False):
        context.tracker.json(run_id, lineage.to_json(), "lineage.json")
        context.tracker.text(run_id, yaml.safe_dump(prompt.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "prompt.yaml")
        if not entries:
            entries = [_found(context, lineage, run_id, trigger)]
    champion = champion_of(entries)
    print(f"dataset revision {head.n} ({rows} rows of {name}), champion {champion['release'][:12]} (version {champion['version']})")
    return {
        "prompt": prompt.model_dump(mode="json"),
        "lineage": lineage.to_json(),
        "champion": champion,
        "baseline": entries[0].body["champion"],
        "fingerprint": mark,
        "mlflow_run_id": run_id,
        "rows": rows,
        "trigger": {"dag_run_id": trigger.dag_run_id, "by": trigger.by, "reason": trigger.reason, "run_type": trigger.run_type},
    }


def _nothing_to_do(prompt: Prompt, trigger: Trigger, earlier: Entry | None, entries: list[Entry], rows: int) -> str | None:
    if trigger.force:
        return None
    if earlier is not None:
        return (
            f"nothing new: run {earlier.body['dag_run_id']} decided {earlier.kind.upper()} on the same data, prompt and code "
            f"(ledger entry {earlier.n}, {earlier.at}); trigger with force to go through all the same"
        )
    last = next((e for e in reversed(entries) if "rows" in e.body), None)
    new = rows - last.body["rows"] if last else rows
    if trigger.run_type != "manual" and 0 <= new < prompt.schedule.min_new_rows and last is not None:
        least = prompt.schedule.min_new_rows
        return f"{new} new rows since ledger entry {last.n}, fewer than schedule.min_new_rows {least}; trigger by hand to go through"
    return None


def _found(context: Context, lineage: Lineage, run_id: str, trigger: Trigger) -> Entry:
    """Entry 0: the template alone, built and registered like any other release, so that the first gate has someone to beat."""
    bare = override(context.prompt, {"tune.method": "none"})
    lineage = context.workspaces.run("preprocess", context.prompt, lineage, context.environment()).lineage
    lineage = context.workspaces.run("tune", bare, lineage, context.environment()).lineage
    version = register(context.registry, context.workspaces, bare, lineage, run_id, {"retune.dag_run_id": trigger.dag_run_id})
    champion = read_release_record(context.workspaces, bare, lineage).champion(version, metrics={})
    body = {"champion": champion, "lineage": lineage.to_json(), "dag_run_id": trigger.dag_run_id, "mlflow_run_id": run_id}
    try:
        entry = context.ledger.append("found", trigger.by, "the template alone, before any tuning", body, None)
    except ConflictError:
        entry = context.ledger.entries()[0]
    context.registry.project(entry.body["champion"]["version"], None)
    return entry


def preprocess(run: Json) -> Json:
    """Runs or restores the stage, and logs profile and dataset to MLflow. Returns `run` with the lineage that includes it."""
    context, run_id = Context.of(run), run["mlflow_run_id"]
    with context.tracker.closing(run_id, done=False):
        lineage = context.workspaces.run("preprocess", context.prompt, Lineage.from_json(run["lineage"]), context.environment()).lineage
        place = f"artifacts/{context.prompt.name}/dataset"
        report = json.loads(context.workspaces.read(lineage, f"{place}/report.json"))
        context.tracker.json(run_id, report, "dataset/report.json")
        context.tracker.text(run_id, context.workspaces.read(lineage, f"{place}/profile.html").decode(), "dataset/profile.html")
        out = context.workspaces.section(lineage, "preprocess", context.prompt.name)["outs"][0]
        source = {"dvc": place, "md5": out["md5"], "revision": lineage.revision}
        context.tracker.dataset(run_id, context.prompt.name, out["md5"], source, run["rows"], "training")
        for split in ("train", "validation", "test"):
            context.tracker.metrics(run_id, {f"rows_{split}": float(len(read_frame(context, lineage, f"{place}/{split}.parquet")))})
    return {**run, "lineage": lineage.to_json()}


def plan(run: Json, trials: list[Json] | None = None) -> list[Json]:
    """The trials, each a name and its overrides: the prompt file's, or the trigger form's. Raises ConfigError on a wrong one."""
    prompt = Prompt.model_validate(run["prompt"])
    planned = []
    for number, overrides in enumerate(trials if trials else prompt.trials, 1):
        override(prompt, overrides)
        changed = ", ".join(f"{key.removeprefix('tune.')}={value}" for key, value in overrides.items())
        planned.append({"name": f"{number}: {changed or 'as in the prompt file'}", "overrides": dict(overrides)})
    if not planned:
        raise ConfigError(f"{prompt.name}: trials must name at least one; `trials: [{{}}]` tunes with the prompt file's own settings")
    return planned


def tune(run: Json, trial: Json) -> Json:
    """One trial in its nested MLflow run; the stage streams its curve there. Retry: a finished trial is restored."""
    context = Context.of(run)
    prompt = override(context.prompt, trial["overrides"])
    key = f"{run['trigger']['dag_run_id']}/trial {trial['name']}"
    run_id = context.tracker.open(key, f"trial {trial['name']}", {"retune.dag_run_id": run["trigger"]["dag_run_id"]}, run["mlflow_run_id"])
    with context.tracker.closing(run_id):
        lineage = Lineage.from_json(run["lineage"])
        done = context.workspaces.run("tune", prompt, lineage, context.environment(run_id))
        candidate = read_release_record(context.workspaces, prompt, done.lineage)
        text = context.workspaces.read(done.lineage, f"artifacts/{prompt.name}/curve.csv").decode()
        rows = [{str(k): v for k, v in row.items() if v == v} for row in pd.read_csv(io.StringIO(text)).to_dict("records")]
        context.tracker.curve(run_id, rows)
        best = min((row for row in rows if "validation_loss" in row), key=lambda row: row["validation_loss"])
        context.tracker.params(run_id, {"tune": prompt.tune.model_dump(mode="json"), "dataset_revision": lineage.revision})
        context.tracker.metrics(run_id, {"best_validation_loss": float(best["validation_loss"]), "best_step": float(best["step"])})
        context.tracker.tags(
            run_id,
            {"retune.release": candidate.release, "retune.lineage": done.lineage.to_json(), "retune.restored": str(done.restored).lower()},
        )
    return {
        "trial": trial,
        "release": candidate.release,
        "lineage": done.lineage.to_json(),
        "validation_loss": float(best["validation_loss"]),
        "mlflow_run_id": run_id,
        "restored": done.restored,
        "seconds": round(done.seconds, 2),
    }


def select(run: Json, tuned: list[Json]) -> list[Json]:
    """The best trial on validation, and who it is compared with: a list for `evaluate`, the candidate first, no release twice."""
    context = Context.of(run)
    best = min(tuned, key=lambda t: (t["validation_loss"], t["trial"]["name"]))
    for trial in tuned:
        print(f"trial {trial['trial']['name']}: validation loss {trial['validation_loss']:.4f}{'  <- candidate' if trial is best else ''}")
    context.tracker.tags(best["mlflow_run_id"], {"retune.selected": "true"})
    contenders = [{"role": "candidate", **best}]
    for role in ("champion", "baseline"):
        other = run[role]
        if other["release"] not in {c["release"] for c in contenders}:
            contenders.append({"role": role, "release": other["release"], "lineage": _beside(context, run, other).to_json()})
    return contenders


def _beside(context: Context, run: Json, champion: Json) -> Lineage:
    """An earlier release, as released, beside today's data and code."""
    return context.workspaces.with_output(Lineage.from_json(run["lineage"]), context.prompt, "tune", champion["outs"])


def evaluate(run: Json, contender: Json) -> Json:
    """One release on the run's test rows, in the same code as any other. Retry: restored when done before."""
    context = Context.of(run)
    prompt = override(context.prompt, contender["trial"]["overrides"]) if "trial" in contender else context.prompt
    done = context.workspaces.run("evaluate", prompt, Lineage.from_json(contender["lineage"]), context.environment())
    metrics = json.loads(context.workspaces.read(done.lineage, f"artifacts/{context.prompt.name}/metrics.json"))
    return {
        **contender,
        "lineage": done.lineage.to_json(),
        "evaluation": metrics,
        "restored": done.restored,
        "seconds": round(done.seconds, 2),
    }


def evaluate_champion(run: Json, champion: Json) -> Json:
    """Another champion than the pinned one, after a race was lost."""
    contender = {"role": "champion", "release": champion["release"], "lineage": _beside(Context.of(run), run, champion).to_json()}
    return evaluate(run, contender)
