"""`start` and `stop` as a command calls them: talks to the supervisor that does the work."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any, cast

import psutil

from retune.errors import RetuneError
from retune.local.configuration import external_mlflow
from retune.local.record import ALREADY, LEFTOVERS, MARKER, READY_WITHIN, Stack, held, marked, owner, running
from retune.settings import Settings

__all__ = ["start", "stop"]

STOP_WITHIN = 20.0
"""Seconds after which a supervisor that was asked to stop is killed; its guards then end the components."""


def start(settings: Settings, on_event: Callable[[dict[str, Any]], None] = lambda _: None) -> tuple[Stack, bool]:
    """Starts the stack unless it runs, and returns it with whether this call started it.

    `on_event` hears of progress: {"event": "migrating"} and {"event": "healthy", "component": ..., "seconds": ...}. If anything goes
    through this call as an exception, KeyboardInterrupt included, all that it started is stopped.

    Raises ConfigError on a wrong setting, RetuneError naming the component that failed, the end of its log and the log's path.
    """
    external_mlflow(os.environ)
    if stack := running(settings):
        return stack, False
    logs = settings.home / "logs"
    for folder in (settings.home, logs):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    environ = os.environ | {
        "RETUNE_PROJECT": str(settings.project),
        "RETUNE_HOME": str(settings.home),
        MARKER: str(settings.home),
    }
    with open(logs / "supervisor.log", "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "retune.local.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=settings.project,
            env=environ,
            start_new_session=True,
        )
    pipe, events = cast(IO[bytes], supervisor.stdin), cast(IO[bytes], supervisor.stdout)
    try:
        for line in events:
            event = json.loads(line)
            if event["event"] == "ready":
                pipe.write(b"detach\n")
                pipe.flush()
                stack = running(settings)
                if stack is None:
                    raise RetuneError(f"the stack stopped as soon as it was ready; see {logs / 'supervisor.log'}")
                return stack, True
            if event["event"] == "failed":
                raise RetuneError(event["message"])
            on_event(event)
        if supervisor.wait() == ALREADY:
            return _join(settings), False
        raise RetuneError(f"the supervisor ended with exit code {supervisor.returncode}; see {logs / 'supervisor.log'}")
    except BaseException:
        pipe.close()  # before "detach" this stops the stack
        with contextlib.suppress(subprocess.TimeoutExpired):
            supervisor.wait(STOP_WITHIN)
        raise


def _join(settings: Settings) -> Stack:
    """The stack that somebody else is starting in this folder."""
    deadline = time.monotonic() + READY_WITHIN
    while held(settings) and time.monotonic() < deadline:
        if stack := running(settings):
            return stack
        time.sleep(0.3)
    raise RetuneError(f"another start in {settings.home} did not finish; see {settings.home / 'logs' / 'supervisor.log'}, then try again")


def stop(settings: Settings) -> bool:
    """Stops the stack and returns once nothing of it runs; False if there was nothing to stop."""
    supervisor = owner(settings)
    if supervisor is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(supervisor.pid)
            process.terminate()
            try:
                process.wait(STOP_WITHIN)
            except psutil.TimeoutExpired:
                process.kill()
    left = marked(settings)
    if left and supervisor is None:
        # A supervisor that was killed: its guards are at work.
        psutil.wait_procs(left, timeout=LEFTOVERS)
    for process in (remaining := marked(settings)):
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(remaining, timeout=5)
    (settings.home / "stack.json").unlink(missing_ok=True)
    return supervisor is not None or bool(left)
