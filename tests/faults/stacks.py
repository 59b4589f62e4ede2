"""The embedded stack as it is: a task's process, its stage, the scheduler and MLflow die while a run goes through Airflow."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from checkouts import copy_project

from faults.places import BATCH, checkout
from faults.runs import RUN, STORED, Running, disturbed, ended, lay_prompts, until
from faults.scenario import Bench, Outcome, Stopwatch, scenario
from retune.local import start, stop
from retune.local.airflow_api import Airflow
from retune.local.http import answers
from retune.settings import Settings
from retune.store import open_store

PREFIX = "airflow-"


@contextmanager
def embedded_stack(bench: Bench, folder: Path) -> Iterator[Running]:
    """`retune up` in a checkout of its own, after the undisturbed run."""
    bench.shared(checkout)
    copy_project(folder)
    for name in lay_prompts(folder, PREFIX, ".retune/landing/{}"):
        shutil.copytree(BATCH, folder / ".retune/landing" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETUNE_PROJECT", str(folder))
        patch.setenv("PYTHONPATH", str(folder / "src"))
        patch.setenv("RETUNE_CHECKPOINT_SECONDS", "1")
        settings = Settings.load()
        stack, _ = start(settings)
    try:
        airflow = Airflow(stack.airflow_url, stack.user, stack.password)
        running = Running(airflow, open_store(settings.store), stack.mlflow_url, settings.prompts, {})
        running.first_run()
        yield running
    finally:
        stop(settings)


def processes(running: Running, holds: Callable[[str], bool]) -> list[psutil.Process]:
    """Those of the stack whose command line holds."""
    project, found = str(running.prompts.parent), []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RETUNE_PROJECT") == project and holds(" ".join(process.cmdline())):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if process.pid != os.getpid()]


def task_process(running: Running, dag: str, module: str = "tune") -> psutil.Process:
    """The process that runs a task of a run, once its stage runs; of one that tunes, once a checkpoint is stored."""
    until(lambda: any(t.task == module and t.state == "running" for t in running.airflow.tasks(dag, RUN)), f"{module} of {dag} ran")

    def found() -> psutil.Process | None:
        for stage in processes(running, lambda line: f"-m retune.stages.{module}" in line and "guard.py" not in line):
            with contextlib.suppress(psutil.Error):
                return next((p for p in stage.parents() if re.match(r"airflow worker -- [0-9a-f-]{36}", " ".join(p.cmdline()))), None)
        return None

    def printed() -> list[str]:
        tasks = [task for task in running.airflow.tasks(dag, RUN) if task.task == module]
        return [line for task in tasks for line in running.airflow.log_lines(dag, RUN, task) if STORED in line]

    process: psutil.Process = until(found, f"the stage of {module} ran")
    if module == "tune":
        until(printed, "the first checkpoint was stored")
    return process


def kill_all(found: list[psutil.Process]) -> int:
    """How many of them were killed."""
    killed = 0
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            killed += 1
    return killed


def _kill_task(bench: Bench, task: str) -> Outcome:
    running = bench.alone(embedded_stack)

    def fault(dag: str) -> tuple[Stopwatch, str]:
        process = task_process(running, dag, task)
        time.sleep(bench.random.uniform(0, 1))
        watch = Stopwatch()
        process.kill()
        return watch, "the task's process was killed"

    return disturbed(bench, running, fault)


@scenario(
    "airflow-kill-tune", "kill -9 of the worker", "tune, under Airflow", "the process that runs the task killed on the embedded stack"
)
def kill_tune(bench: Bench) -> Outcome:
    return _kill_task(bench, "tune")


@scenario(
    "airflow-kill-evaluate",
    "kill -9 of the worker",
    "evaluate, under Airflow",
    "the process that runs the task killed on the embedded stack",
)
def kill_evaluate(bench: Bench) -> Outcome:
    return _kill_task(bench, "evaluate")


@scenario(
    "airflow-kill-scheduler",
    "kill -9 of the scheduler",
    "tune, under Airflow",
    "the scheduler killed on the embedded stack while a task tunes; the supervisor starts it again",
)
def kill_scheduler(bench: Bench) -> Outcome:
    running = bench.alone(embedded_stack)

    def fault(dag: str) -> tuple[Stopwatch, str]:
        task_process(running, dag)
        watch = Stopwatch()
        if not kill_all(processes(running, lambda line: "airflow scheduler" in line and "guard.py" not in line)):
            raise RuntimeError("there was no scheduler to kill")
        return watch, "the scheduler was killed"

    return disturbed(bench, running, fault)


def _mlflow(running: Running) -> list[psutil.Process]:
    return processes(running, lambda line: "retune.local.mlflow_server" in line and "guard.py" not in line)


@scenario(
    "airflow-mlflow-down",
    "MLflow down for a minute",
    "tune, under Airflow",
    "MLflow's server stopped (SIGSTOP) for a minute on the embedded stack while a task tunes: it takes connections and is silent",
)
def mlflow_silent(bench: Bench) -> Outcome:
    running = bench.alone(embedded_stack)

    def fault(dag: str) -> tuple[Stopwatch, str]:
        task_process(running, dag)
        servers, watch = _mlflow(running), Stopwatch()
        if not servers:
            raise RuntimeError("there was no MLflow to stop")
        for process in servers:
            process.send_signal(signal.SIGSTOP)
        time.sleep(60)
        for process in servers:
            process.send_signal(signal.SIGCONT)
        return watch, "MLflow did not answer for a minute"

    return disturbed(bench, running, fault)


@scenario(
    "airflow-mlflow-killed",
    "MLflow down for a minute",
    "tune, under Airflow",
    "MLflow's server killed five times as it comes back on the embedded stack, so that it refuses connections",
)
def mlflow_killed(bench: Bench) -> Outcome:
    running = bench.alone(embedded_stack)

    def fault(dag: str) -> tuple[Stopwatch, str]:
        task_process(running, dag)
        watch, kills = Stopwatch(), 0
        while watch.seconds < 60 and kills < 5:  # a sixth time would be one too many for the supervisor
            kills += kill_all(_mlflow(running))
            time.sleep(1)
        if kills < 5:
            raise RuntimeError(f"MLflow was killed {kills} times in a minute, not five")
        until(lambda: answers(f"{running.tracking_uri}/health"), "MLflow answered again")
        return watch, f"MLflow was killed five times and answered again after {watch.seconds:.0f} s"

    return disturbed(bench, running, fault)


@scenario(
    "airflow-trigger-twice",
    "the same DAG run triggered twice",
    "all, under Airflow",
    "the run triggered anew under its run id while it runs, and after its end, through Airflow's API",
)
def trigger_twice(bench: Bench) -> Outcome:
    running = bench.alone(embedded_stack)

    def fault(dag: str) -> tuple[Stopwatch, str]:
        watch = Stopwatch()
        running.airflow.trigger(dag, RUN, {})
        ended(running, dag)
        running.airflow.trigger(dag, RUN, {})
        return watch, "the second and third triggers found the run"

    return disturbed(bench, running, fault)
