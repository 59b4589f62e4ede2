"""Runs through an Airflow that meets a fault: each of a prompt of its own, all with the same rows and settings.

One of the prompts is left in peace. What the others have in store, ledger and MLflow after their first run is compared with what that one
has, under neutral names: as many sections, entries, runs, points, artifacts, versions, the same rows, and the same bytes of the tensors.
"""

import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.counting import audited, compared, in_mlflow, in_store
from faults.places import NAME, PROBES, QUICK
from faults.scenario import SCENARIOS, Bench, Outcome, Stopwatch
from retune.dvc_files import outs
from retune.errors import RetuneError
from retune.ledger import Ledger, standing
from retune.local.airflow_api import FINISHED, Airflow, TaskState
from retune.local.http import Refused, Unreachable
from retune.objects import Objects, object_key
from retune.recorded import champion
from retune.store import Store

__all__ = ["RUN", "STORED", "UNDISTURBED", "Running", "dag_of", "disturbed", "ended", "lay_prompts", "own_prompt", "until"]

UNDISTURBED = "undisturbed"
RUN = "the-run"
STORED = "checkpoint of step"
"""Stands in a task's log once a checkpoint is stored."""
PATIENCE = 900.0
TENSORS = "adapter/adapter_model.safetensors"
NO_CACHE = Path("/nonexistent")


@dataclass
class Running:
    """An Airflow whose runs are disturbed. `first_run` must have been called."""

    airflow: Airflow
    store: Store
    tracking_uri: str
    prompts: Path
    environment: Mapping[str, str]
    """What this process needs to read store and MLflow."""

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield

    def first_run(self) -> None:
        """The run that nothing disturbs, after the only ingest: what it left, the tensors' hash, and the seconds of its tasks."""
        for dag in ("ingest", dag_of(UNDISTURBED)):
            self.airflow.wait_for_dag(dag, 120)
            self.airflow.trigger(dag, RUN, {})
            if (state := ended(self, dag)) != "success":
                raise RuntimeError(f"the undisturbed run of {dag} ended with {state}")
        with self.at_hand():
            self.expected, self.tensors = self.standing(UNDISTURBED), self.tensors_of(UNDISTURBED)
        if self.tensors is None:
            raise RuntimeError("the undisturbed run was to be promoted")
        self.seconds = {task.task: task.seconds or 0.0 for task in self.airflow.tasks(dag_of(UNDISTURBED), RUN)}

    def standing(self, prompt: str) -> "Counter[str]":
        """As counted by `counting`, with names that are the same for every prompt. All prompts share the objects, which are left out."""
        found: Counter[str] = Counter()
        for name, count in (in_store(self.store, prompt) + in_mlflow(self.tracking_uri, prompt)).items():
            if not name.startswith("object "):
                found[name if name.startswith("row ") else _neutral(name, prompt)] += count
        return found

    def tensors_of(self, prompt: str) -> str | None:
        """md5 of the champion's tensors; None where there is no champion, or it is the template alone."""
        recorded = champion(self.store, prompt)
        objects = Objects(self.store, NO_CACHE)
        return objects.files(recorded.lineage, f"artifacts/{prompt}/release").get(TENSORS) if recorded else None

    def missing(self, prompt: str) -> list[str]:
        """Objects of the champion's lineage, and aliases of the ledger's releases, that are not what they should be."""
        recorded = champion(self.store, prompt)
        if recorded is None:
            return ["a champion"]
        objects, lineage = Objects(self.store, NO_CACHE), recorded.lineage
        tracked = {md5 for out in outs(lineage) for md5 in (out["md5"], *objects.files(lineage, out["path"]).values())}
        lost = objects.missing(tracked)
        damaged = [md5 for md5 in tracked - {*lost} if self.store.md5(object_key(md5)) != md5.removesuffix(".dir")]
        now = standing(Ledger(self.store, prompt).entries())
        releases = {"champion": now.champion, "previous": now.previous}
        there = in_mlflow(self.tracking_uri, prompt)
        wanted = {f"alias {alias} {release['release']}" for alias, release in releases.items() if release}
        return [*(f"object {md5}" for md5 in (*lost, *damaged)), *sorted(wanted - there.keys())]


def _neutral(name: str, prompt: str) -> str:
    """Without the prompt's name, numbers of revisions, and hashes, which hold both."""
    name = re.sub(r"[0-9a-f]{64}|[0-9a-f]{32}|\b[0-9a-f]{12}\b", "#", name)
    return re.sub(r"\brevision \d+", "revision N", re.sub(rf"\b{prompt}\b", "P", name))


def dag_of(prompt: str) -> str:
    return f"retrain_{prompt}"


def own_prompt(scenario: str) -> str:
    return scenario.replace("-", "_")


def lay_prompts(folder: Path, prefix: str, landing: str) -> list[str]:
    """The quick prompt file, for each scenario of that prefix and for the undisturbed run, in place of the examples. Names.

    `landing`: where a prompt's files land, `{}` being its name.
    """
    prompt = yaml.safe_load((folder / f"prompts/{NAME}.yaml").read_text("utf-8"))
    prompt["evaluate"] |= PROBES
    prompt["tune"] |= {"validate_every": 10}
    checks = folder / f"prompts/{NAME}.checks.yaml"
    kept = checks.read_bytes() if checks.is_file() else None
    shutil.rmtree(folder / "prompts")
    (folder / "prompts").mkdir()
    names = [UNDISTURBED, *(own_prompt(name) for name in SCENARIOS if name.startswith(prefix))]
    for name in names:
        own = {**prompt, **QUICK, "name": name, "source": {**prompt["source"], "path": landing.format(name)}}
        (folder / f"prompts/{name}.yaml").write_text(yaml.safe_dump(own, sort_keys=False, allow_unicode=True), "utf-8")
        if kept is not None:
            (folder / f"prompts/{name}.checks.yaml").write_bytes(kept)
    return names


def ended(running: Running, dag: str) -> str:
    """The state in which the run ended."""
    return str(until(lambda: (state := running.airflow.run(dag, RUN)["state"]) in FINISHED and state, f"the run of {dag} ended"))


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """What the condition gives once it holds; Airflow may be away meanwhile. Raises RuntimeError if it is not in time."""
    watch, away = Stopwatch(), ""
    while watch.seconds < seconds:
        try:
            if found := condition():
                return found
        except (RetuneError, Refused, Unreachable) as error:
            away = f" (last answer: {error})"
        time.sleep(0.2)
    raise RuntimeError(f"not within {seconds:.0f} s: {what}{away}")


def disturbed(bench: Bench, running: Running, fault: Callable[[str], tuple[Stopwatch, str]]) -> Outcome:
    """The first run of the scenario's prompt, with the fault in it. `fault` is told the DAG; its watch starts where the fault does."""
    prompt = own_prompt(bench.folder.name)
    dag = dag_of(prompt)
    running.airflow.wait_for_dag(dag, 120)
    running.airflow.trigger(dag, RUN, {})
    watch, told = fault(dag)
    state = ended(running, dag)
    seconds = watch.seconds
    with running.at_hand():
        lost, doubled, differences = compared(running.expected, running.standing(prompt))
        missing = running.missing(prompt)
        same = running.tensors_of(prompt) == running.tensors
        problems = audited(running.store, running.prompts / f"{prompt}.yaml") + [f"missing: {name}" for name in missing[:5]]
        verdicts = [entry.body["decision"]["verdict"] for entry in Ledger(running.store, prompt).entries() if "decision" in entry.body]
    happened = f"{told}; {_tries(running.airflow.tasks(dag, RUN))}; the run ended {state} with {', '.join(verdicts) or 'no verdict'}"
    return Outcome(
        state == "success" and same and not problems,
        seconds,
        lost + len(missing),
        doubled,
        "; ".join(filter(None, [happened, "the same bytes of the tensors" if same else "OTHER TENSORS", differences, *problems])),
    )


def _tries(tasks: list[TaskState]) -> str:
    again = {task.label: task.try_number for task in tasks if task.try_number > 1}
    return f"tries: {', '.join(f'{label} {count}' for label, count in again.items())}" if again else "no task was tried again"
