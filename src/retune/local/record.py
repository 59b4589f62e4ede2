"""What is known of a stack from outside: `stack.json`, the lock that its supervisor holds, and its processes."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from retune.local.files import read_json, write_private
from retune.settings import Settings

__all__ = ["ALREADY", "LEFTOVERS", "MARKER", "READY_WITHIN", "Process", "Stack", "held", "lock", "marked", "owner", "running"]

MARKER = "RETUNE_STACK"
"""Environment variable of every process of a stack; its value is the stack's home folder."""

ALREADY = 3
"""Exit code: another supervisor holds the folder."""
READY_WITHIN = 300.0
"""Seconds after which a start has failed."""
LEFTOVERS = 15.0
"""Seconds that processes of a killed stack get to end before a new start kills them."""


@dataclass(frozen=True)
class Process:
    """A process id that cannot be mistaken for a later process with the same number."""

    pid: int
    created: float
    """Start time, seconds since 1970."""

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return False


@dataclass(frozen=True)
class Stack:
    """A running stack, as `stack.json` says."""

    supervisor: Process
    started: str
    """ISO 8601, UTC."""
    airflow_url: str
    airflow_home: str
    user: str
    password_file: str
    mlflow_url: str
    mlflow_external: bool
    """True if MLFLOW_TRACKING_URI named a server before the start; then none was started."""
    components: dict[str, dict[str, Any]]
    """Name -> pid, state (running, restarting, failed), restarts, log."""

    @property
    def password(self) -> str:
        return str((read_json(Path(self.password_file)) or {}).get(self.user, ""))

    def save(self, settings: Settings) -> None:
        write_private(settings.home / "stack.json", json.dumps(asdict(self), indent=1))


def running(settings: Settings) -> Stack | None:
    """The stack of this home folder if its supervisor is alive and has reported it ready; a stale `stack.json` is none."""
    raw = read_json(settings.home / "stack.json")
    if raw is None:
        return None
    try:
        stack = Stack(**(raw | {"supervisor": Process(**raw["supervisor"])}))
    except (KeyError, TypeError):
        return None
    return stack if stack.supervisor.alive() else None


def _lock_file(settings: Settings) -> Path:
    return settings.home / "stack.lock"


@contextmanager
def lock(settings: Settings) -> Iterator[bool]:
    """Holds the folder's lock, which the kernel drops when this process dies; yields False if another process holds it."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with _lock_file(settings).open("a+") as file:
        if not _try(file, fcntl.LOCK_EX):
            yield False
            return
        file.truncate(0)
        file.write(json.dumps(asdict(Process.of(os.getpid()))))
        file.flush()
        yield True


def held(settings: Settings) -> bool:
    """Whether a supervisor of this folder is alive, ready or not."""
    try:
        with _lock_file(settings).open() as file:
            return not _try(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _try(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def owner(settings: Settings) -> Process | None:
    """The supervisor that holds the lock."""
    if not held(settings):
        return None
    raw = read_json(_lock_file(settings))
    with suppress(TypeError):
        process = Process(**(raw or {}))
        return process if process.alive() else None
    return None


def marked(settings: Settings) -> list[psutil.Process]:
    """Every process of this folder's stack, by its environment, the caller and those it descends from apart."""
    own = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid not in own and process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKER) == str(settings.home):
                found.append(process)
    return found
