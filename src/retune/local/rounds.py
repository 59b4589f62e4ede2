"""One round as a person sees it: files land, `ingest` makes a revision of them, `retrain_<prompt>` comes to a verdict."""

import secrets
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from retune.errors import RetuneError
from retune.ledger import Entry, Ledger
from retune.local.airflow_api import Airflow
from retune.local.progress import Finished, follow
from retune.local.record import Stack
from retune.store import Store

__all__ = ["VERDICTS", "connect", "explain_failure", "explain_nothing", "ingest", "new_run_id", "retrain_after", "start_run", "verdict_of"]

ASSET_WAIT = 20.0
"""Seconds in which Airflow starts the run that a new revision's Asset event asks for."""
VERDICTS = ("promote", "hold", "reject")


def connect(stack: Stack) -> Airflow:
    return Airflow(stack.airflow_url, stack.user, stack.password)


def new_run_id() -> str:
    """Sorts by time; unique, and so the key under which a trigger may be repeated."""
    return f"retune__{datetime.now(UTC):%Y-%m-%dT%H.%M.%S}_{secrets.token_hex(3)}"


def start_run(airflow: Airflow, dag: str, conf: dict[str, Any], note: str | None = None) -> str:
    """Triggers a run once Airflow knows the DAG; returns its id."""
    airflow.wait_for_dag(dag)
    run_id = new_run_id()
    airflow.trigger(dag, run_id, conf, note)
    return run_id


def ingest(airflow: Airflow, console: Console) -> Finished:
    """Runs `ingest` and shows it. Raises RetuneError if it fails."""
    run_id = start_run(airflow, "ingest", {})
    console.print(f"[bold]ingest[/] {run_id}", highlight=False)
    finished = follow(airflow, "ingest", run_id, console)
    if finished.state != "success":
        raise RetuneError(explain_failure(airflow, finished))
    return finished


def retrain_after(airflow: Airflow, prompt: str, since: datetime, conf: dict[str, Any]) -> tuple[str, bool]:
    """The run that the Asset event of a revision starts, or one triggered here if there is none in time or it failed.

    Returns its id and whether it was triggered here.
    """
    dag = f"retrain_{prompt}"
    airflow.wait_for_dag(dag)
    deadline = time.monotonic() + ASSET_WAIT
    while time.monotonic() < deadline:
        runs = airflow.runs_since(dag, since)
        if good := [run for run in runs if run["state"] != "failed"]:
            return str(good[-1]["dag_run_id"]), False
        if runs:
            break
        time.sleep(0.5)
    return start_run(airflow, dag, conf), True


def verdict_of(store: Store, prompt: str, run_id: str) -> Entry | None:
    """The ledger entry in which a DAG run decided."""
    entries = Ledger(store, prompt).entries()
    return next((e for e in reversed(entries) if e.kind in VERDICTS and e.body.get("dag_run_id") == run_id), None)


def explain_nothing(airflow: Airflow, finished: Finished) -> str:
    """Why a green run came to no verdict, in the words of its first task."""
    first = next((t for t in finished.tasks if t.task == "resolve"), None)
    lines = airflow.log_lines(finished.dag, finished.run_id, first) if first else []
    words = ("nothing new", "new rows since")
    return next((line for line in lines if any(word in line for word in words)), "nothing to do; see the log of its task `resolve`")


def explain_failure(airflow: Airflow, finished: Finished) -> str:
    """Which tasks failed, the end of their logs, and where to read on."""
    parts = [f"{finished.dag} {finished.run_id} failed"]
    for task in finished.tasks:
        if task.state == "failed":
            end = "\n    ".join(airflow.log_lines(finished.dag, finished.run_id, task)[-12:])
            parts.append(f"  {task.label}, try {task.try_number}:\n    {end}")
    parts.append(f"  whole logs: {airflow.url}/dags/{finished.dag}/runs/{finished.run_id}")
    return "\n".join(parts)
