"""Follows a DAG run until it ends: a live table on a terminal, a line per change elsewhere."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from retune.local.airflow_api import FINISHED, Airflow, TaskState

__all__ = ["Finished", "follow", "task_table"]

COLOURS = {
    "success": "green",
    "running": "cyan",
    "failed": "red",
    "upstream_failed": "red",
    "up_for_retry": "yellow",
    "skipped": "bright_black",
}
POLL = 2.0
"""Seconds between two looks."""


@dataclass(frozen=True)
class Finished:
    """A DAG run at its end."""

    dag: str
    run_id: str
    state: str
    """success or failed."""
    tasks: list[TaskState]

    @property
    def seconds(self) -> dict[str, float]:
        """Task label -> seconds it ran, of those that ran."""
        return {task.label: round(task.seconds, 1) for task in self.tasks if task.seconds is not None and task.state != "skipped"}


def task_table(tasks: Iterable[TaskState]) -> Table:
    """One row per task instance."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("task", "state", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for task in tasks:
        colour = COLOURS.get(task.state, "bright_black")
        tries = f" (try {task.try_number})" if task.try_number > 1 else ""
        table.add_row(f"  {task.label}", f"[{colour}]{task.state}{tries}[/]", "" if task.seconds is None else f"{task.seconds:.1f} s")
    return table


def follow(airflow: Airflow, dag: str, run_id: str, console: Console) -> Finished:
    """Shows the run's tasks until it has ended. Leaves the run alone if it is interrupted (Ctrl-C stops the looking only)."""
    shown: dict[tuple[str, int], str] = {}
    with Live(console=console, refresh_per_second=8, transient=False) if console.is_terminal else _NoLive() as live:
        while True:
            run = airflow.run(dag, run_id)
            tasks = airflow.tasks(dag, run_id)
            if isinstance(live, Live):
                live.update(task_table(tasks))
            else:
                for task in tasks:
                    if (
                        task.state in ("running", "success", "failed", "up_for_retry", "skipped")
                        and shown.get((task.task, task.map_index)) != task.state
                    ):
                        shown[task.task, task.map_index] = task.state
                        ended = f" {task.seconds:.1f} s" if task.seconds is not None and task.state in ("success", "failed") else ""
                        console.print(f"  {task.label}: {task.state}{ended}", markup=False, highlight=False)
            if run["state"] in FINISHED:
                return Finished(dag, run_id, run["state"], tasks)
            time.sleep(POLL)


class _NoLive:
    def __enter__(self) -> "_NoLive":
        return self

    def __exit__(self, *_: object) -> None:
        return None
