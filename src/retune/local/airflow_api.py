"""Airflow's REST API, as far as Retune uses it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from retune.errors import ConfigError, RetuneError
from retune.local.http import Refused, Unreachable, request

__all__ = ["FINISHED", "Airflow", "TaskState"]

FINISHED = ("success", "failed")
"""States in which a DAG run stays."""
PATIENCE = 60.0
"""Seconds that an api-server which answered before may take to answer again."""


@dataclass(frozen=True)
class TaskState:
    """One task instance of a run."""

    task: str
    label: str
    """Task id, with the mapped instance's name if there is one."""
    map_index: int
    state: str
    """Airflow's state; "waiting" before it has one."""
    seconds: float | None
    """So far, or in all once it has ended; None before the start."""
    started: str | None
    try_number: int


class Airflow:
    """A logged-in client. Every method raises RetuneError if the server does not answer or refuses."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self.url = url
        self._login = {"username": user, "password": password}
        self._token: str | None = None

    def _call(self, path: str, method: str = "GET", body: Any = None, allow: Iterable[int] = ()) -> Any:
        """The answer, or None if its status is one of `allow`. All calls may be repeated, so an api-server that restarts is waited for."""
        deadline = time.monotonic() + PATIENCE
        fresh = self._token is None
        self._token = self._token or self._log_in()
        while True:
            try:
                return request(f"{self.url}/api/v2/{path}", method, body, self._token, timeout=30)
            except Refused as error:
                if error.status == 401 and not fresh:
                    fresh, self._token = True, self._log_in()  # expired after a day, or the stack has new keys
                elif error.status in allow:
                    return None
                else:
                    raise RetuneError(f"Airflow refused {method} {path}: {error}") from None
            except Unreachable as error:
                if time.monotonic() > deadline:
                    raise RetuneError(f"Airflow does not answer ({error}); see `retune status` and `retune doctor`") from None
                time.sleep(1)

    def _log_in(self) -> str:
        try:
            return str(request(f"{self.url}/auth/token", "POST", self._login)["access_token"])
        except Refused as error:
            raise RetuneError(f"Airflow refused the login of {self._login['username']!r}: {error}") from None
        except Unreachable as error:
            raise RetuneError(f"Airflow does not answer ({error}); start it with `retune up`") from None

    def ensure_pool(self, name: str, slots: int, description: str) -> None:
        """Creates a pool; one that exists keeps its slots, which may be somebody's choice."""
        self._call("pools", "POST", {"name": name, "slots": slots, "description": description}, allow=(409,))

    def import_errors(self) -> list[tuple[str, str]]:
        """DAG files that cannot be imported, each with the last line of its traceback."""
        errors = self._call("importErrors?limit=10")["import_errors"]
        return [(str(e["filename"]), (str(e["stack_trace"]).strip().splitlines() or ["?"])[-1]) for e in errors]

    def wait_for_dag(self, dag: str, timeout: float = 60) -> None:
        """Returns once the DAG is known. Raises ConfigError with the import errors if it is not in time."""
        self._wait_for(f"DAG {dag!r}", f"dags/{quote(dag)}", timeout)

    def wait_for_task(self, dag: str, task: str, timeout: float = 90) -> None:
        """Returns once the DAG has the task: a new prompt file brings one when Airflow reads its DAGs again. Raises as `wait_for_dag`."""
        self._wait_for(f"task {task!r} in the DAG {dag!r}", f"dags/{quote(dag)}/tasks/{quote(task)}", timeout)

    def _wait_for(self, what: str, path: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._call(path, allow=(404,)) is None:
            if (errors := self.import_errors()) or time.monotonic() > deadline:
                listed = "".join(f"\n  {file}: {text}" for file, text in errors)
                raise ConfigError(
                    f"Airflow knows no {what}" + (f"; these files fail to import:{listed}" if listed else "; see `retune doctor`")
                )
            time.sleep(0.5)

    def trigger(self, dag: str, run_id: str, conf: dict[str, Any], note: str | None = None) -> None:
        """Starts a run; one that exists under this id is left as it is, so that a repeated call starts nothing twice."""
        body = {"dag_run_id": run_id, "logical_date": None, "conf": conf, "note": note}
        self._call(f"dags/{quote(dag)}/dagRuns", "POST", body, allow=(409,))

    def run(self, dag: str, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call(f"dags/{quote(dag)}/dagRuns/{quote(run_id, safe='')}")
        return found

    def runs_since(self, dag: str, since: datetime) -> list[dict[str, Any]]:
        """Runs queued at or after a time, oldest first."""
        runs: list[dict[str, Any]] = self._call(f"dags/{quote(dag)}/dagRuns?order_by=-run_after&limit=50")["dag_runs"]
        found = [r for r in runs if r.get("queued_at") and datetime.fromisoformat(r["queued_at"]) >= since]
        return sorted(found, key=lambda r: str(r["queued_at"]))

    def tasks(self, dag: str, run_id: str) -> list[TaskState]:
        """Task instances in the order in which they started, those that have not yet last."""
        path = f"dags/{quote(dag)}/dagRuns/{quote(run_id, safe='')}/taskInstances?limit=100"
        found = [_task(raw) for raw in self._call(path)["task_instances"]]
        return sorted(found, key=lambda t: (t.started is None, t.started or "", t.task, t.map_index))

    def log_lines(self, dag: str, run_id: str, task: TaskState) -> list[str]:
        """The events in a task's log, those of its stages included; Airflow's own groups apart."""
        instance = f"dags/{quote(dag)}/dagRuns/{quote(run_id, safe='')}/taskInstances/{quote(task.task)}"
        answer = self._call(f"{instance}/logs/{max(task.try_number, 1)}?map_index={task.map_index}&full_content=true", allow=(404,))
        lines: list[str] = []
        for event in (answer or {}).get("content", []):
            if isinstance(event, dict):
                lines += str(event.get("event", "")).splitlines()
                lines += [f"{e.get('exc_type')}: {e.get('exc_value')}" for e in event.get("error_detail") or []]
        return [line for line in lines if line.strip() and not line.startswith("::")]


def _task(raw: dict[str, Any]) -> TaskState:
    name, index = str(raw["task_id"]), int(raw["map_index"])
    mapped = raw.get("rendered_map_index") or (str(index) if index >= 0 else None)
    seconds = raw["duration"]
    if raw["start_date"] and not raw["end_date"]:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(raw["start_date"])).total_seconds()
    return TaskState(
        task=name,
        label=f"{name} [{mapped}]" if mapped else name,
        map_index=index,
        state=raw["state"] or "waiting",
        seconds=seconds,
        started=raw["start_date"],
        try_number=int(raw["try_number"]),
    )
