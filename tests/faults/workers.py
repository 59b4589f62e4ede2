"""Workers: each a home, a cache and a temporary folder of its own on the store, the landing zone and the MLflow that all share."""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Done", "Task", "TaskFailed", "Worker", "kill_at", "try_of", "wait_at"]

PATIENCE = 900.0
"""Seconds that any one task may take; a whole undisturbed run is one, on a machine that others use too."""
MARK = "RETUNE_FAULT_WORKER"
"""Stands in the environment of a worker's processes, so that those left behind are found."""


class TaskFailed(Exception):
    """A task ended with an error; its text is the end of its output."""


def kill_at(place: str, when: str = "before", call: int = 1, seconds: float = 0.0) -> dict[str, Any]:
    """SIGKILL at a function that the task comes by, or so many seconds later; see worker.py."""
    return {"place": place, "when": when, "call": call, "do": "kill", "seconds": seconds}


def wait_at(place: str, file: Path, when: str = "before", call: int = 1) -> dict[str, Any]:
    """Waits there for `file`.go; `file`.reached says that it does."""
    return {"place": place, "when": when, "call": call, "do": "wait", "file": str(file)}


def try_of(number: int) -> dict[str, str]:
    """What Airflow tells a task of its tries; the first is 1."""
    return {"AIRFLOW_CTX_TRY_NUMBER": str(number)}


@dataclass(frozen=True)
class Done:
    code: int
    output: str
    result: Any
    """None unless the code is 0."""


class Task:
    """A task that runs."""

    def __init__(self, process: "subprocess.Popen[str]", told: Path) -> None:
        self.process = process
        self._told = told
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self._lines)

    def until(self, seen: Callable[[], object], what: str) -> None:
        """Returns once `seen` holds. Raises TaskFailed if the task ends before."""
        deadline = time.monotonic() + PATIENCE
        while not seen():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._reader.join(5)
                if seen():
                    return
                raise TaskFailed(f"the task ended with {self.process.poll()} before {what}:\n{self.output[-3000:]}")
            time.sleep(0.02)

    def line(self, text: str) -> None:
        """Returns once a line of the output holds a text."""
        self.until(lambda: any(text in line for line in self._lines), f"its output held {text!r}")

    def kill(self) -> None:
        self.process.kill()

    def kill_stage(self, module: str) -> None:
        """SIGKILL for the stage's own process, as the kernel does when memory is short."""
        found: list[psutil.Process] = []

        def running() -> bool:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    if module in child.cmdline() and "-m" in child.cmdline() and "retune/guard.py" not in " ".join(child.cmdline()):
                        found.append(child)
                except psutil.Error:
                    continue
            return bool(found)

        self.until(running, f"{module} ran")
        found[-1].kill()

    def wait(self) -> Done:
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._reader.join(30)
        result = json.loads(self._told.read_text("utf-8")) if code == 0 else None
        return Done(code, self.output, result)


@dataclass
class Worker:
    """Runs tasks, one process each."""

    folder: Path
    project: Path
    shared: Mapping[str, str]
    """Environment that all workers have: store, MLflow, endpoint, credentials, prompts."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Environment that only this one has, such as another clock."""

    def __post_init__(self) -> None:
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        self._mark = secrets.token_hex(8)

    @property
    def environment(self) -> dict[str, str]:
        mine = {
            "RETUNE_PROJECT": str(self.project),
            "PYTHONPATH": str(self.project / "src"),
            "RETUNE_HOME": str(self.folder / "home"),
            "RETUNE_CACHE": str(self.folder / "cache"),
            "TMPDIR": str(self.folder / "tmp"),
            "RETUNE_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONUNBUFFERED": "1",
            MARK: self._mark,
        }
        host = {name: value for name, value in os.environ.items() if not name.startswith(("RETUNE_", "MLFLOW_", "AIRFLOW", "AWS_"))}
        return {**host, **mine, **self.shared, **self.own}

    def start(
        self, task: str, *arguments: Any, points: Sequence[Mapping[str, Any]] = (), more: Mapping[str, str] | None = None, **named: Any
    ) -> Task:
        order, told = self.folder / f"{secrets.token_hex(4)}.order", self.folder / f"{secrets.token_hex(4)}.told"
        asked = {"task": task, "arguments": arguments, "named": named, "points": list(points), "result": str(told)}
        order.write_text(json.dumps(asked), "utf-8")
        command = [sys.executable, str(Path(__file__).parent / "worker.py"), str(order)]
        environment = {**self.environment, **(more or {})}
        return Task(
            subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ),
            told,
        )

    def run(self, task: str, *arguments: Any, **how: Any) -> Any:
        """A task's result. Raises TaskFailed with the end of its output."""
        done = self.start(task, *arguments, **how).wait()
        if done.code:
            raise TaskFailed(f"{task} ended with {done.code}:\n{done.output[-3000:]}")
        return done.result

    def killed(self, task: str, *arguments: Any, **how: Any) -> str:
        """A task that must die of SIGKILL, by the points in `how`; its output. Raises TaskFailed if it lives."""
        done = self.start(task, *arguments, **how).wait()
        if done.code != -signal.SIGKILL:
            raise TaskFailed(f"{task} was to be killed and ended with {done.code}:\n{done.output[-3000:]}")
        return done.output

    def left(self, seconds: float = 15.0) -> list[str]:
        """Processes of this worker that still run after that time."""
        deadline = time.monotonic() + seconds
        while (found := self._running()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _running(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except (psutil.Error, OSError):
                continue
        return found
