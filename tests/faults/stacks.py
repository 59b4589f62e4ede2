"""The embedded stack as it is: a task's process, its stage, the scheduler and MLflow die while a run goes through Airflow."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from checkouts import copy_project

from faults.counting import audited, in_mlflow, in_store
from faults.places import BATCH, NAME, PROBES, QUICK, checkout
from faults.scenario import Bench, Outcome, Stopwatch, scenario
from retune.ledger import Ledger
from retune.local import Stack, start, stop
from retune.local.airflow_api import FINISHED, Airflow
from retune.settings import Settings
from retune.store import open_store

DAG = f"retrain_{NAME}"
PATIENCE = 600.0


@dataclass
class Running:
    settings: Settings
    stack: Stack
    airflow: Airflow
    runs: int = 0

    def standing(self) -> "Counter[str]":
        return in_store(open_store(self.settings.store), NAME) + in_mlflow(self.stack.mlflow_url, NAME)


@contextmanager
def embedded_stack(bench: Bench, folder: Path) -> Iterator[Running]:
    """`retune up` in a checkout of its own, with the first batch ingested and a champion."""
    bench.shared(checkout)
    copy_project(folder)
    path = folder / f"prompts/{NAME}.yaml"
    prompt = yaml.safe_load(path.read_text("utf-8"))
    prompt["evaluate"] |= PROBES
    path.write_text(yaml.safe_dump({**prompt, **QUICK}, sort_keys=False), "utf-8")
    landing = folder / prompt["source"]["path"]
    shutil.copytree(BATCH, landing)
    before = {name: os.environ.get(name) for name in ("RETUNE_PROJECT", "PYTHONPATH", "RETUNE_CHECKPOINT_SECONDS")}
    os.environ |= {"RETUNE_PROJECT": str(folder), "PYTHONPATH": str(folder / "src"), "RETUNE_CHECKPOINT_SECONDS": "1"}
    settings = Settings.load()
    try:
        stack, _ = start(settings)
        airflow = Airflow(stack.airflow_url, stack.user, stack.password)
        airflow.wait_for_dag(DAG, 120)
        airflow.wait_for_dag("ingest", 120)
        running = Running(settings, stack, airflow)
        for dag, run_id in (("ingest", "ingest"), (DAG, "first")):
            airflow.trigger(dag, run_id, {})
            if (state := ended(running, dag, run_id)) != "success":
                raise RuntimeError(f"the undisturbed run of {dag} ended with {state}")
        yield running
    finally:
        stop(settings)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def ended(running: Running, dag: str, run_id: str) -> str:
    return str(until(lambda: (state := running.airflow.run(dag, run_id)["state"]) in FINISHED and state, f"{run_id} ended"))


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    watch = Stopwatch()
    while not (found := condition()):
        if watch.seconds > seconds:
            raise RuntimeError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)
    return found


def processes(running: Running, holds: Callable[[str], bool]) -> list[psutil.Process]:
    """Those of the stack whose command line holds."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RETUNE_HOME") == str(running.settings.home) and holds(" ".join(process.cmdline())):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def runner_of(running: Running, module: str) -> psutil.Process:
    """The process that runs an Airflow task, found from the stage that it started."""

    def found() -> psutil.Process | None:
        for stage in processes(running, lambda line: f"-m {module}" in line and "guard.py" not in line):
            with contextlib.suppress(psutil.Error):
                return next((p for p in stage.parents() if re.match(r"airflow worker -- [0-9a-f-]{36}", " ".join(p.cmdline()))), None)
        return None

    process: psutil.Process = until(found, f"{module} ran under Airflow")
    return process


def disturbed(
    bench: Bench, seed: int, fault: Callable[[Running, str], tuple[Stopwatch, str]], conf: dict[str, Any] | None = None
) -> Outcome:
    """A run that tunes with another seed, the fault in it; then the same run's account: one decision, one MLflow run, one release."""
    running: Running = bench.shared(embedded_stack)
    before = running.standing()
    run_id = f"{bench.folder.name}"
    running.airflow.trigger(DAG, run_id, {"force": True, "overrides": {"tune.seed": seed}, **(conf or {})})
    watch, told = fault(running, run_id)
    state = ended(running, DAG, run_id)
    seconds = watch.seconds
    entries = [e for e in Ledger(open_store(running.settings.store), NAME).entries() if e.body.get("dag_run_id") == run_id]
    after = running.standing()
    missing = {name: count for name, count in (before - after).items() if not name.startswith("alias ")}  # a promotion moves those
    gained = after - before
    # What one run adds: a decision, a parent and a trial in MLflow, and at most one version. No point of a curve twice.
    kinds = Counter(name.split()[0] for name in gained.elements())
    twice = [name for name, count in gained.items() if count > 1 and not name.startswith(("run ", "model "))]
    doubled = (
        max(0, len(entries) - 1)
        + max(0, kinds["version"] - 1)
        + max(0, kinds["run"] - 2)
        + max(0, kinds["model"] - kinds["version"])
        + len(twice)
    )
    problems = audited(open_store(running.settings.store), running.settings.prompts / f"{NAME}.yaml")
    tasks = {task.label: task.try_number for task in running.airflow.tasks(DAG, run_id) if task.try_number > 1}
    lost = sum(missing.values()) + (0 if entries else 1)
    retried = f"tries: {', '.join(f'{label} {count}' for label, count in tasks.items())}" if tasks else "no task was tried again"
    verdict = entries[0].body["decision"]["verdict"] if entries else "none"
    happened = f"{told}; {retried}; the run ended {state} with {verdict}"
    return Outcome(
        state == "success" and not problems,
        seconds,
        lost,
        doubled,
        "; ".join(filter(None, [happened, *list(missing)[:3], *twice[:3], *problems])),
    )


def kill_runner(module: str) -> Callable[[Running, str], tuple[Stopwatch, str]]:
    def fault(running: Running, _run_id: str) -> tuple[Stopwatch, str]:
        runner = runner_of(running, module)
        time.sleep(1.5)
        watch = Stopwatch()
        runner.kill()
        return watch, "the task's process was killed"

    return fault


@scenario(
    "airflow-kill-tune", "kill -9 of the worker", "tune, under Airflow", "the process that runs the task killed on the embedded stack"
)
def airflow_kill_tune(bench: Bench) -> Outcome:
    return disturbed(bench, 101, kill_runner("retune.stages.tune"))


@scenario(
    "airflow-kill-evaluate",
    "kill -9 of the worker",
    "evaluate, under Airflow",
    "the process that runs the task killed on the embedded stack",
)
def airflow_kill_evaluate(bench: Bench) -> Outcome:
    return disturbed(bench, 102, kill_runner("retune.stages.evaluate"))


@scenario(
    "airflow-kill-scheduler",
    "kill -9 of the scheduler",
    "tune, under Airflow",
    "the scheduler killed on the embedded stack while a task tunes; the supervisor starts it again",
)
def airflow_kill_scheduler(bench: Bench) -> Outcome:
    def fault(running: Running, _run_id: str) -> tuple[Stopwatch, str]:
        runner_of(running, "retune.stages.tune")
        schedulers = processes(running, lambda line: "airflow scheduler" in line and "guard.py" not in line)
        watch = Stopwatch()
        for process in schedulers:
            process.kill()
        return watch, "the scheduler was killed"

    return disturbed(bench, 103, fault)


@scenario(
    "airflow-mlflow-down",
    "MLflow down for a minute",
    "tune, under Airflow",
    "MLflow's server stopped (SIGSTOP) for a minute on the embedded stack while a task tunes: it takes connections and is silent",
)
def airflow_mlflow_down(bench: Bench) -> Outcome:
    def fault(running: Running, _run_id: str) -> tuple[Stopwatch, str]:
        runner_of(running, "retune.stages.tune")
        servers = processes(running, lambda line: "retune.local.mlflow_server" in line and "guard.py" not in line)
        watch = Stopwatch()
        for process in servers:
            process.send_signal(signal.SIGSTOP)
        time.sleep(60)
        for process in servers:
            process.send_signal(signal.SIGCONT)
        return watch, "MLflow did not answer for a minute"

    return disturbed(bench, 104, fault)


@scenario(
    "airflow-mlflow-killed",
    "MLflow down for a minute",
    "tune, under Airflow",
    "MLflow's server killed again and again for a minute on the embedded stack, so that it refuses connections",
)
def airflow_mlflow_killed(bench: Bench) -> Outcome:
    def fault(running: Running, _run_id: str) -> tuple[Stopwatch, str]:
        runner_of(running, "retune.stages.tune")
        watch, kills = Stopwatch(), 0
        while watch.seconds < 60 and kills < 5:  # a sixth time would be one too many for the supervisor
            for process in processes(running, lambda line: "retune.local.mlflow_server" in line and "guard.py" not in line):
                process.kill()
                kills += 1
            time.sleep(1)
        return watch, f"MLflow was killed {kills} times"

    return disturbed(bench, 105, fault)


@scenario(
    "airflow-trigger-twice",
    "the same DAG run triggered twice",
    "all, under Airflow",
    "two commands at the same time and one after the end, all with the same run id, through Airflow's API",
)
def airflow_trigger_twice(bench: Bench) -> Outcome:
    def fault(running: Running, run_id: str) -> tuple[Stopwatch, str]:
        watch = Stopwatch()
        running.airflow.trigger(DAG, run_id, {"force": True, "overrides": {"tune.seed": 106}})
        ended(running, DAG, run_id)
        running.airflow.trigger(DAG, run_id, {"force": True, "overrides": {"tune.seed": 106}})
        return watch, "the second and third triggers found the run"

    return disturbed(bench, 106, fault)
