"""The first task of `retrain_<prompt>`: pins revision, prompt and champion for the run, or finds that there is nothing to do.

Finding that costs little: the store is read, and nothing heavier than it is imported.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from retune.checks import Checks, read_checks
from retune.config import Prompt, load_prompt, override, sha256_json
from retune.errors import BadInputError, ConflictError
from retune.ledger import Entry, Ledger, decided
from retune.records import Lineage, Trigger
from retune.settings import Settings
from retune.tasks.context import Context, Json, champion_of

__all__ = ["fingerprint", "resolve"]

WHY = {"asset_triggered": "new data", "scheduled": "schedule", "manual": "by hand"}
"""Airflow's type of a run, in the words of a list that people read."""


def fingerprint(context: Context, lineage: Lineage, checks: Checks | None = None) -> str:
    """Hash of everything that a retrain run's verdict follows from, the champion apart: promotion must not cause the next run."""
    science = (
        "task",
        "base_model",
        "template",
        "target",
        "labels",
        "slices",
        "preprocess",
        "tune",
        "generation",
        "trials",
        "evaluate",
        "promote",
    )
    fields = context.prompt.model_dump(mode="json")
    return sha256_json(
        {
            "data": context.workspaces.data_hash(lineage, context.prompt.name),
            "prompt": {name: fields[name] for name in science},
            "code": context.workspaces.code_hash(context.prompt),
            **({"checks": checks.model_dump(mode="json")} if checks else {}),
        }
    )


def resolve(
    name: str,
    trigger: Json,
    overrides: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    approval: bool = False,
    patch: bool = False,
) -> Json | None:
    """Pins revision, prompt and champion for the run; None if there is nothing to do, which the log explains.

    `trigger`: a `Trigger` as JSON. `overrides`: prompt fields to replace. `force`: go through even if the ledger has decided on the same
    inputs. `approval`: ask a person before promotion, whatever the prompt file says. `patch`: write lineage as a git patch.
    Raises ConfigError on a wrong override or file of checks, BadInputError when a person asks for a run without data, IntegrityError if
    somebody moved MLflow's alias to a version that does not verify. Retry: safe.
    """
    started_by, overrides = Trigger.from_json(trigger), dict(overrides or {})
    settings = Settings.load()
    prompt = override(load_prompt(settings.prompts / f"{name}.yaml"), overrides)
    checks = read_checks(settings.prompts, prompt)
    context = Context.load(prompt)
    head = Ledger(context.workspaces.store, "dataset").head()
    rows = head.body["rows"].get(name, 0) if head else 0
    if head is None or not rows:
        missing = f"no data of {name} yet: land files in {prompt.source.path}, then run the DAG `ingest`"
        if started_by.run_type == "manual":
            raise BadInputError(missing)
        print(missing)
        return None
    lineage = context.workspaces.lineage(head.body["data"], head.n, overrides)
    mark = fingerprint(context, lineage, checks)
    entries = context.ledger.entries()
    if not force and (nothing := _nothing_to_do(prompt, started_by, decided(entries, mark), entries, rows)):
        print(nothing)
        return None
    run_id = _open_run(context, started_by, lineage, mark)
    with context.tracker.working(run_id):
        context.tracker.json(run_id, lineage.to_json(), "lineage.json")
        context.tracker.text(run_id, yaml.safe_dump(prompt.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "prompt.yaml")
        if not entries:
            entries = [_found(context, lineage, run_id, started_by)]
        else:
            from retune.tasks.alias import follow_alias

            entries = follow_alias(context, entries)
    champion = champion_of(entries)
    print(f"dataset revision {head.n} ({rows} rows of {name}), champion {champion['release'][:12]} (version {champion['version']})")
    return {
        "prompt": prompt.model_dump(mode="json"),
        "checks": checks.model_dump(mode="json") if checks else None,
        "lineage": lineage.to_json(),
        "champion": champion,
        "baseline": entries[0].body["champion"],
        "fingerprint": mark,
        "mlflow_run_id": run_id,
        "rows": rows,
        "trigger": trigger,
        "approval": approval or prompt.promote.approval,
        "patch": patch,
        "links": {"MLflow run": context.run_link(run_id), "Release": context.release_link(champion["version"])},
    }


def _nothing_to_do(prompt: Prompt, trigger: Trigger, earlier: Entry | None, entries: list[Entry], rows: int) -> str | None:
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


def _open_run(context: Context, trigger: Trigger, lineage: Lineage, mark: str) -> str:
    """The MLflow run of this DAG run: the same one on a retry, another one if the DAG run is cleared after its inputs changed.

    Runs that an earlier DAG run of this prompt left open are closed: only one at a time is active.
    """
    changed = ", ".join(f"{key.removeprefix('tune.')}={value}" for key, value in lineage.overrides.items())
    key = f"{trigger.dag_run_id}/{mark}"
    for orphan in context.tracker.close_orphans(key):
        print(f"MLflow run {orphan} was left open by a run that was killed: closed")
    return context.tracker.open(
        key,
        f"{changed or WHY.get(trigger.run_type, trigger.run_type)} · revision {lineage.revision}",
        {
            "retune.dag_run_id": trigger.dag_run_id,
            "retune.dag_id": trigger.dag_id,
            "retune.airflow_url": trigger.url,
            "retune.triggered_by": trigger.by,
            "retune.run_type": trigger.run_type,
            "retune.reason": trigger.reason,
            "retune.dataset_revision": str(lineage.revision),
            "retune.fingerprint": mark,
            "retune.commit": lineage.commit,
            "retune.dirty": str(lineage.dirty).lower(),
            "retune.environment": lineage.environment,
            "mlflow.note.content": f"[DAG run {trigger.dag_run_id}]({trigger.url}) by {trigger.by}" if trigger.url else "",
        },
    )


def _found(context: Context, lineage: Lineage, run_id: str, trigger: Trigger) -> Entry:
    """Entry 0: the template alone, built and registered like any other release, so that the first gate has someone to beat."""
    from retune.tasks.release import read_release_record, register

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
