"""A process of Retune's own under guard: its output goes to the log, and a failure becomes an error that says why."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from retune.errors import BadInputError, ConfigError, IntegrityError, StageError
from retune.guard import run_guarded
from retune.stages import BAD_INPUT

__all__ = ["run_child", "terminated_as_exception"]

KEPT = 15
"""Last lines of the output that an error repeats."""


def run_child(what: str, command: Sequence[str], folder: Path, environment: Mapping[str, str], on_line: Callable[[str], None]) -> None:
    """Runs a command in a folder, with `environment` on top of this process's and this interpreter's programs first.

    Raises StageError with the last lines of one that fails; BadInputError, ConfigError or IntegrityError where it told by
    `retune.stages.run_stage` that a retry cannot help.
    """
    tail: list[str] = []

    def keep(line: str) -> None:
        tail.append(line)
        del tail[:-KEPT]
        on_line(line)

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    code = run_guarded(command, cwd=folder, env={**os.environ, "PATH": path, **environment}, on_line=keep)
    if code:
        if told := [line for line in tail if line.startswith(BAD_INPUT)]:
            kind, message = json.loads(told[-1].removeprefix(BAD_INPUT))
            raise {"ConfigError": ConfigError, "IntegrityError": IntegrityError}.get(kind, BadInputError)(message)
        killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        hint = (
            " It was killed (SIGKILL), mostly for want of memory: lower tune.batch_size (or tune.batch_tokens) or give the worker more."
            if killed
            else ""
        )
        raise StageError(f"{what} failed with exit code {code}.{hint} Its last lines:\n" + "\n".join(tail))


@contextmanager
def terminated_as_exception() -> Iterator[None]:
    """Turns SIGTERM into an exception here, so that the child's whole group is stopped before the task ends, and ends failed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise StageError(f"stopped by signal {signal.Signals(signum).name}; the stage's process group was ended with it")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
