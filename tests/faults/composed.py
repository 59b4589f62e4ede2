"""The stack of docker-compose.yml (compose_stack): workers, scheduler, Postgres, Redis, MLflow and the object store die under a run."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from compose_stack import Stack, compose_stack, compose_variables, production_project

from faults.places import BATCH, checkout
from faults.runs import RUN, STORED, Running, disturbed, lay_prompts, until
from faults.scenario import Bench, Outcome, Stopwatch, scenario
from retune.store import open_store, s3_client

PREFIX = "compose-"
HEARTBEATS = "60"
"""Seconds without a heartbeat after which the scheduler gives a task up; 300 by default, which a scenario would wait for at each kill."""
STAGES = ("resolve", "preprocess", "tune", "evaluate", "measure", "decide", "promote")


@dataclass
class Composed(Running):
    stack: Stack


@contextmanager
def composed(bench: Bench, folder: Path) -> Iterator[Composed]:
    """All services with two workers for trials, after the undisturbed run."""
    bench.shared(checkout)
    project = production_project(folder / "project")
    names = lay_prompts(project, PREFIX, "s3://landing/{}")
    file = project / "docker-compose.yml"
    services = yaml.safe_load(file.read_text("utf-8"))
    services["services"]["scheduler"]["environment"]["AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT"] = HEARTBEATS
    file.write_text(yaml.safe_dump(services, sort_keys=False), "utf-8")
    variables = compose_variables(folder / ".env") | {"RETUNE_CHECKPOINT_SECONDS": "1"}
    with compose_stack(project, folder / "stack", variables) as stack:
        given = stack.variables("worker-default")
        environment = {name: value for name, value in given.items() if name.startswith(("AWS_", "MLFLOW_TRACKING_"))}
        store = open_store(given["RETUNE_STORE"], stack.address("object-store", 9000))
        running = Composed(stack.api(), store, stack.address("mlflow", 5000), project / "prompts", environment, stack)
        with running.at_hand():
            s3 = s3_client(stack.address("object-store", 9000))
            s3.create_bucket(Bucket="landing")
            for name in names:
                for rows in BATCH.iterdir():
                    s3.put_object(Bucket="landing", Key=f"{name}/{rows.name}", Body=rows.read_bytes())
        running.first_run()
        if not any(STORED.encode() in worker.log.read_bytes() for worker in stack.of("worker-gpu")):
            raise RuntimeError("no worker has printed that a checkpoint was stored: moments cannot be told")
        yield running


def instances(running: Composed, dag: str, task: str) -> list[dict[str, Any]]:
    """Airflow's records of a task of the run: state, try_number, hostname, map_index."""
    found = running.stack.ask(f"dags/{dag}/dagRuns/{quote(RUN, safe='')}/taskInstances?limit=100")["task_instances"]
    return [one for one in found if one["task_id"] == task]


def begun(running: Composed, dag: str, task: str) -> dict[str, Any]:
    """A task instance that runs on a worker."""

    def one() -> Any:
        return next((i for i in instances(running, dag, task) if i["state"] == "running" and i["hostname"]), None)

    found: dict[str, Any] = until(one, f"{task} of {dag} ran")
    return found


@scenario(
    "compose-kill-stages",
    "kill -9 of the worker",
    "every stage, under Celery",
    "in every task of a run the worker that has it is killed with all its processes, at a random moment; a GPU worker stays away until "
    "the retry runs on the other; the scheduler is told to miss heartbeats after 60 s",
)
def kill_stages(bench: Bench) -> Outcome:
    running = bench.alone(composed)
    running.stack.wait_healthy()

    def fault(dag: str) -> tuple[Stopwatch, str]:
        told = [_kill_worker(bench, running, dag, task) for task in STAGES]
        (tune,) = [task for task in running.airflow.tasks(dag, RUN) if task.task == "tune"]
        resumed = [line for line in running.airflow.log_lines(dag, RUN, tune) if "going on from the checkpoint" in line]
        if not resumed:
            raise RuntimeError("the retry of tune began anew: no line says that it went on from a checkpoint")
        return watch, f"killed: {'; '.join(told)}; tune's retry: {resumed[0].rpartition(': ')[2]}"

    watch = Stopwatch()
    return disturbed(bench, running, fault)


def _kill_worker(bench: Bench, running: Composed, dag: str, task: str) -> str:
    """Kills the worker that has a task, tune's when a checkpoint is stored; returns once the task runs again.

    Raises RuntimeError if the task was done before.
    """
    if task == "tune":
        found, moment = tuning(running, dag)[0], bench.random.uniform(0, 1)
    else:
        found, moment = begun(running, dag, task), bench.random.uniform(0.05, 0.75) * running.seconds[task]
    time.sleep(moment)
    host, watch = found["hostname"], Stopwatch()
    has_other = host.startswith("worker-gpu")
    running.stack.kill(host, comes_back=not has_other)

    def again() -> dict[str, Any] | None:
        now = next(one for one in instances(running, dag, task) if one["map_index"] == found["map_index"])
        if now["try_number"] > found["try_number"] and now["state"] in ("running", "success"):
            return now
        if now["state"] in ("success", "failed", "upstream_failed"):
            raise RuntimeError(
                f"{task} ended with {now['state']} at try {now['try_number']}; its worker was killed in {found['try_number']}"
            )
        return None

    try:
        retried = until(again, f"{task} was tried again")
    finally:
        if has_other:
            running.stack.start(host)
    since = "first checkpoint" if task == "tune" else "start"
    return f"{task} {moment:.1f} s after its {since} on {host}, {watch.seconds:.0f} s later again on {retried['hostname']}"


def tuning(running: Composed, dag: str) -> tuple[dict[str, Any], Callable[[], str]]:
    """The task instance that tunes, once it has stored a checkpoint, and what gives all that its worker has printed since it began."""
    found = begun(running, dag, "tune")
    (worker,) = running.stack.of(found["hostname"])
    before = worker.log.stat().st_size

    def printed() -> str:
        return worker.log.read_bytes()[before:].decode("utf-8", "replace")

    until(lambda: STORED in printed(), "the first checkpoint was stored")
    return found, printed


def _while_tuning(bench: Bench, fault: Callable[[Stack, Callable[[], str]], str]) -> Outcome:
    """`fault` is given the stack and what the worker has printed; it says what was done."""
    running = bench.alone(composed)
    running.stack.wait_healthy()

    def meets(dag: str) -> tuple[Stopwatch, str]:
        _, printed = tuning(running, dag)
        return Stopwatch(), fault(running.stack, printed)

    return disturbed(bench, running, meets)


def _away(stack: Stack, name: str, seconds: float) -> str:
    """Killed, and started again after a time; returns once it is healthy, and Airflow's API with it."""
    watch = Stopwatch()
    stack.kill(name, comes_back=False)
    time.sleep(seconds)
    stack.start(name)
    stack.wait_healthy(name, "api-server")
    return f"{name} was killed, started after {seconds:.0f} s and healthy again {watch.seconds:.0f} s after it was killed"


@scenario(
    "compose-scheduler",
    "kill -9 of the scheduler",
    "tune, under Celery",
    "the scheduler killed while a task tunes; its restart policy starts it again",
)
def scheduler(bench: Bench) -> Outcome:
    def kill(stack: Stack, _: Callable[[], str]) -> str:
        stack.kill("scheduler")
        return "the scheduler was killed"

    return _while_tuning(bench, kill)


@scenario("compose-postgres", "Postgres restart", "tune, under Celery", "Postgres killed while a task tunes, and started again 10 s later")
def postgres(bench: Bench) -> Outcome:
    return _while_tuning(bench, lambda stack, _: _away(stack, "postgres", 10))


@scenario("compose-redis", "Redis restart", "tune, under Celery", "Redis killed while a task tunes, and started again 10 s later")
def redis(bench: Bench) -> Outcome:
    return _while_tuning(bench, lambda stack, _: _away(stack, "redis", 10))


@scenario(
    "compose-mlflow", "MLflow down for a minute", "tune, under Celery", "MLflow killed while a task tunes, and started again a minute later"
)
def mlflow(bench: Bench) -> Outcome:
    return _while_tuning(bench, lambda stack, _: _away(stack, "mlflow", 60))


@scenario(
    "compose-object-store",
    "S3 does not answer",
    "tune, under Celery",
    "the object store killed while a task tunes and stores a checkpoint every second, and started again 30 s later",
)
def object_store(bench: Bench) -> Outcome:
    def away(stack: Stack, printed: Callable[[], str]) -> str:
        told = _away(stack, "object-store", 30)
        met = re.findall(r"the checkpoint was not stored|cannot (?:create|write|read) .*", printed())
        if not met:
            raise RuntimeError("nothing that the task did met the fault")
        return f"{told}; the task met it {len(met)} times"

    return _while_tuning(bench, away)
