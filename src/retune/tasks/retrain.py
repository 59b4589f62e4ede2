"""The tasks of `retrain_<prompt>` between `resolve` and `decide`. Each takes what the earlier ones returned (XCom) and may be retried.

`run` is what the first task pinned: the resolved prompt, the lineage, the champion, the MLflow run. No later task looks at the dataset
ledger's head again, so that all of a run sees one revision.
"""

import io
import json
from typing import Any

from retune.config import Prompt, override
from retune.errors import ConfigError
from retune.evaluation.roles import BASELINE, CANDIDATE, CHAMPION, FEW_SHOT
from retune.records import Lineage
from retune.rewritten import Rewritten
from retune.tasks.context import Context, Json
from retune.tasks.release import read_release_record
from retune.workspace import StageRun

__all__ = ["evaluate", "evaluate_champion", "plan", "preprocess", "select", "tune"]


def preprocess(run: Json) -> Json:
    """Runs or restores the stage, and logs profile and dataset to MLflow. Returns `run` with the lineage that includes it.

    `family`: of the base model, as the methods on offer depend on it."""
    context, run_id = Context.of(run), run["mlflow_run_id"]
    with context.tracker.working(run_id):
        # What was pinned may be gone since: a forget of another prompt's rows rewrote the revision for all.
        pinned = Rewritten.of(context.workspaces.store).current(Lineage.from_json(run["lineage"]))
        done = context.workspaces.run("preprocess", context.prompt, pinned, context.environment())
        lineage = done.lineage
        place = f"artifacts/{context.prompt.name}/dataset"
        report = json.loads(context.workspaces.read(lineage, f"{place}/report.json"))
        context.tracker.json(run_id, report, "dataset/report.json")
        context.tracker.text(run_id, context.workspaces.read(lineage, f"{place}/profile.html").decode(), "dataset/profile.html")
        out = context.workspaces.section(lineage, "preprocess", context.prompt.name)["outs"][0]
        source = {"dvc": place, "md5": out["md5"], "revision": lineage.revision}
        context.tracker.dataset(run_id, context.prompt.name, out["md5"], source, run["rows"], "training")
        rows = {f"rows_{name}": split["rows"] for name, split in report["splits"].items()}
        settings = {**_inputs(context.prompt, lineage), **rows, "preprocess": context.prompt.preprocess.model_dump(mode="json")}
        context.tracker.params(run_id, settings)
    return {**run, "lineage": lineage.to_json(), "family": report["base_model_family"]}


def plan(run: Json, trials: list[Json] | None = None) -> list[Json]:
    """The trials, each a name and its overrides: the prompt file's, or the trigger form's; after them the few-shot baseline.

    The baseline is measured beside the candidate and never becomes it; where a trial is the same already, that one is what is measured.
    Raises ConfigError on a wrong trial.
    """
    prompt = Prompt.model_validate(run["prompt"])
    planned: list[Json] = []
    for number, overrides in enumerate(trials if trials else prompt.trials, 1):
        override(prompt, overrides)
        changed = ", ".join(f"{key.removeprefix('tune.')}={value}" for key, value in overrides.items())
        planned.append({"name": f"{number}: {changed or 'as in the prompt file'}", "overrides": dict(overrides)})
    if not planned:
        raise ConfigError(f"{prompt.name}: trials must name at least one; `trials: [{{}}]` tunes with the prompt file's own settings")
    if prompt.evaluate.few_shot and run["family"] != "encoder" and not any(_is_few_shot(prompt, trial) for trial in planned):
        overrides = {"tune.method": "few_shot", "tune.examples": prompt.evaluate.few_shot}
        planned.append({"name": "few-shot baseline", "overrides": overrides, "baseline": True})
    return planned


def _is_few_shot(prompt: Prompt, trial: Json) -> bool:
    """Whether a trial is what the few-shot baseline would be."""
    tune = override(prompt, trial["overrides"]).tune
    return (tune.method, tune.examples) == ("few_shot", prompt.evaluate.few_shot)


def tune(run: Json, trial: Json) -> Json:
    """One trial in its nested MLflow run; the stage streams its curve there. Retry: a finished trial is restored."""
    import pandas as pd  # here, since the tasks beside this one do without it

    context = Context.of(run)
    prompt = override(context.prompt, trial["overrides"])
    parent = run["mlflow_run_id"]
    tags = {"retune.dag_run_id": run["trigger"]["dag_run_id"], "retune.airflow_url": run["trigger"]["url"]}
    run_id = context.tracker.open(f"{parent}/trial {trial['name']}", f"trial {trial['name']}", tags, parent)
    with context.tracker.working(parent), context.tracker.working(run_id, done=True):
        lineage = Lineage.from_json(run["lineage"])
        done = context.workspaces.run("tune", prompt, lineage, context.environment(run_id))
        candidate = read_release_record(context.workspaces, prompt, done.lineage)
        text = context.workspaces.read(done.lineage, f"artifacts/{prompt.name}/curve.csv").decode()
        rows = [{str(k): v for k, v in row.items() if v == v} for row in pd.read_csv(io.StringIO(text)).to_dict("records")]
        context.tracker.curve(run_id, rows)
        best = min((row for row in rows if "validation_loss" in row), key=lambda row: row["validation_loss"])
        context.tracker.params(run_id, {"tune": prompt.tune.model_dump(mode="json"), **_inputs(prompt, lineage)})
        context.tracker.metrics(run_id, {"best_validation_loss": float(best["validation_loss"]), "best_step": float(best["step"])})
        context.tracker.tags(run_id, _provenance(context, run_id, candidate.release, done))
    return {
        "trial": trial,
        "release": candidate.release,
        "lineage": done.lineage.to_json(),
        "validation_loss": float(best["validation_loss"]),
        "mlflow_run_id": run_id,
        "restored": done.restored,
        "seconds": round(done.seconds, 2),
        "links": {"MLflow run": context.run_link(run_id)},
    }


def _inputs(prompt: Prompt, lineage: Lineage) -> Json:
    """What runs of different days differ in besides their settings, as columns to sort and compare by."""
    model = prompt.base_model
    return {"dataset_revision": lineage.revision, "base_model": model.hub or model.path, "commit": lineage.commit[:12]}


def _provenance(context: Context, run_id: str, release: str, done: StageRun) -> dict[str, Any]:
    """Tags that say what a trial made, and which run computed it where this one restored it."""
    tags = {"retune.release": release, "retune.lineage": done.lineage.to_json(), "retune.restored": str(done.restored).lower()}
    source = context.tracker.computed(release, besides=run_id) if done.restored else None
    return tags | ({"retune.restored_from": source} if source else {})


def select(run: Json, tuned: list[Json]) -> list[Json]:
    """The best trial on validation, and who it is compared with: a list for `evaluate`, the candidate first, no release twice.

    The candidate's `few_shot` is the release that plays that part, if one does; the candidate itself may.
    """
    context = Context.of(run)
    best = min((t for t in tuned if not t["trial"].get("baseline")), key=lambda t: (t["validation_loss"], t["trial"]["name"]))
    few_shot = next((t for t in tuned if _is_few_shot(context.prompt, t["trial"])), None)
    for trial in tuned:
        print(f"trial {trial['trial']['name']}: validation loss {trial['validation_loss']:.4f}{'  <- candidate' if trial is best else ''}")
    contenders = [{"role": CANDIDATE, **_without_links(best), "few_shot": few_shot and few_shot["release"]}]
    if few_shot and few_shot["release"] != best["release"]:
        contenders.append({"role": FEW_SHOT, **_without_links(few_shot)})
    for role in (CHAMPION, BASELINE):
        other = run[role]
        if other["release"] not in {c["release"] for c in contenders}:
            contenders.append({"role": role, "release": other["release"], "lineage": _beside(context, run, other).to_json()})
    return contenders


def _without_links(tuned: Json) -> Json:
    return {key: value for key, value in tuned.items() if key != "links"}


def _beside(context: Context, run: Json, champion: Json) -> Lineage:
    """An earlier release, as released, beside today's data and code."""
    return context.workspaces.with_output(Lineage.from_json(run["lineage"]), context.prompt, "tune", champion["outs"])


def evaluate(run: Json, contender: Json) -> Json:
    """One release on the run's test rows, in the same code as any other. Retry: restored when done before."""
    context = Context.of(run)
    prompt = override(context.prompt, contender["trial"]["overrides"]) if "trial" in contender else context.prompt
    with context.failing(run["mlflow_run_id"]):
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
    contender = {"role": CHAMPION, "release": champion["release"], "lineage": _beside(Context.of(run), run, champion).to_json()}
    return evaluate(run, contender)
