"""Ties a command's life to its parent's: when the parent is gone, even by `kill -9`, nothing of the command is left.

    python -m retune.guard -- COMMAND ...      (standard input: a pipe whose other end the parent holds)

The guard is a small process between the two. It has a session of its own, runs COMMAND as its child and watches the pipe. At
the pipe's end, when its parent is gone, or at SIGTERM, SIGINT or SIGHUP, every descendant of the command gets SIGTERM (or that
signal), 4 s of grace, then SIGKILL; so does whatever the command leaves behind when it ends by itself. Descendants that made
sessions of their own are among them on Linux, where orphans become the guard's children. If the guard itself is killed, the
kernel kills the command (Linux), and the parent kills the group.

The guard's exit code is the command's: 128 + n after signal n, 127 for a command that does not exist, 126 for one that cannot be
run. Standard library alone, and nothing of Retune: it runs as a file in an isolated interpreter, which starts in about 30 ms.
"""

import codecs
import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Guarded", "main", "run_guarded"]

GRACE = 4.0
"""Seconds from SIGTERM to SIGKILL. Airflow gives a task 5 s."""
PATIENCE = 4.5
"""Seconds that a parent gives the guard before it kills the rest itself."""
UNKILLABLE = 10.0
"""Seconds after SIGKILL at which the guard stops waiting for a process that the kernel holds (a hung device)."""
LONGEST_LINE = 65_536
"""Characters after which an unfinished line is handed on as it is."""

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_LINE_END = re.compile(r"\r\n|\n|\r(?=[^\n])")


class Guarded:
    """A command that runs under its guard, as its parent sees it. Usable as a context manager, which stops it at the end.

    Holds the only write end of the guard's pipe: when this process dies, or the object is dropped, the command is ended.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", on_line: Callable[[str], None] | None) -> None:
        self._process = process
        self._on_line = on_line
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._unfinished = ""
        self._code: int | None = None

    @classmethod
    def start(
        cls,
        command: Sequence[str | os.PathLike[str]],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Self:
        """Starts a command and returns at once.

        Its standard output and error go, together, to the end of the file `output`; or by line to `on_line`, which `wait` and
        `stop` call; or where this process's go.

        Raises OSError if `cwd` does not exist or `output` cannot be written. A command that does not exist ends with 127.
        """
        if output is not None and on_line is not None:
            raise ValueError("either output or on_line, not both")
        with contextlib.ExitStack() as files:
            stdout = files.enter_context(output.open("ab")) if output is not None else subprocess.PIPE if on_line else None
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, "--", *(os.fspath(word) for word in command)],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=subprocess.STDOUT if stdout is not None else None,
                bufsize=0,
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        return cls(process, on_line)

    @property
    def pid(self) -> int:
        """The guard's process id, which is also the id of the command's process group and session."""
        return self._process.pid

    def poll(self) -> int | None:
        """The command's exit code (128 + n after signal n), or None while any of it runs."""
        if self._code is None and self._ended():
            # Killed before it is reaped: until then its id, the group's, cannot belong to anybody else. After a guard that
            # ended in order the group is empty; after one that was killed these are the orphans.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            code = self._process.wait()
            self._code = 128 - code if code < 0 else code
            self._close_pipe()
        return self._code

    def wait(self) -> int:
        """The exit code, once everything has ended. Hands lines to `on_line` meanwhile."""
        while (code := self.wait_for(3600)) is None:
            pass
        return code

    def wait_for(self, seconds: float) -> int | None:
        """The exit code once everything has ended, or None after that time. Hands lines to `on_line` meanwhile."""
        deadline = time.monotonic() + seconds
        pause = 0.005
        while self.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            if self._process.stdout is None:
                time.sleep(min(pause, left))
                pause = min(pause * 2, 0.1)
            else:
                self._read(min(left, 0.2))
        while self._process.stdout is not None and self._read(0):
            pass  # what was written before the end
        return self._code

    def stop(self) -> int:
        """Ends the command and all its descendants, within 4.5 s, and returns the exit code. Harmless after the end."""
        self._close_pipe()
        try:
            if self.wait_for(PATIENCE) is None:
                for pid in _descendants(self.pid):
                    _signal(pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            return self.wait()
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
                self._process.stdout = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __del__(self) -> None:
        self._close_pipe()  # subprocess keeps a running process that is dropped, and its pipe with it

    def _close_pipe(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _ended(self) -> bool:
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            # Reaped by somebody else's wait for any child: the exit code is lost, and must not read as success.
            self._process.returncode = 255
            return True

    def _read(self, timeout: float) -> bool:
        """Hands on what the command wrote; False at the end of its output or after `timeout` seconds without any."""
        stdout = self._process.stdout
        if stdout is None:
            return False
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return False
        data = os.read(stdout.fileno(), 65_536)
        *lines, self._unfinished = _LINE_END.split(self._unfinished + self._decode(data, not data))
        if self._unfinished and (not data or len(self._unfinished) > LONGEST_LINE):
            lines.append(self._unfinished.rstrip("\r"))
            self._unfinished = ""
        if not data:
            stdout.close()
            self._process.stdout = None
        for line in lines:
            self._deliver(line)
        return bool(data)

    def _deliver(self, line: str) -> None:
        # An on_line that raised is not called again while the command is stopped: the first error is the one to see.
        on_line, self._on_line = self._on_line, None
        if on_line is not None:
            on_line(line)
            self._on_line = on_line


def run_guarded(
    command: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    output: Path | None = None,
) -> int:
    """Runs a command under a guard and returns its exit code: 128 + n after signal n, so 137 for out of memory as a rule.

    `on_line` gets each line of its standard output and error as it is written (also those that end in a carriage return),
    without the line's end, invalid UTF-8 replaced. When an exception passes through (`on_line`'s own, KeyboardInterrupt, one that
    a signal handler raises), the command and its descendants have ended before it goes on: SIGTERM, then SIGKILL, 4.5 s in all.

    Raises OSError if `cwd` does not exist or `output` cannot be written.
    """
    with Guarded.start(command, cwd=cwd, env=env, output=output, on_line=on_line) as guarded:
        return guarded.wait()


def _processes() -> list[tuple[int, int, int]]:
    """Process id, parent's id and group of each running process, zombies apart."""
    if not Path("/proc/self/stat").exists():
        return _processes_by_ps()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # ended since the listing
                # pid (name) state ppid pgrp ..., where the name may hold spaces and brackets
                state, parent, group = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()[:3]
                if state not in b"ZX":
                    found.append((int(entry.name), int(parent), int(group)))
    return found


def _processes_by_ps() -> list[tuple[int, int, int]]:
    with subprocess.Popen(["ps", "-axo", "pid=,ppid=,pgid=,stat="], stdout=subprocess.PIPE, text=True) as ps:
        rows = [line.split() for line in ps.communicate()[0].splitlines()]
    return [(int(pid), int(parent), int(group)) for pid, parent, group, state in rows if state[0] not in "ZX" and int(pid) != ps.pid]


def _descendants(root: int) -> list[int]:
    """What descends from `root` or is in its process group, `root` itself apart."""
    processes = _processes()
    found = {root}
    while more := {pid for pid, parent, group in processes if pid not in found and (parent in found or group == root)}:
        found |= more
    return sorted(found - {root})


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def main(arguments: Sequence[str]) -> int:
    """The guard itself; see the module's text. Returns the command's exit code."""
    if len(arguments) < 2 or arguments[0] != "--":
        print("usage: python -m retune.guard -- COMMAND ...", file=sys.stderr)
        return 2
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _prctl(_CHILD_SUBREAPER, 1)
    woken, waker = os.pipe()
    for descriptor in (woken, waker):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # the number arrives through the wake-up pipe

    guard = os.getpid()

    def die_with_the_guard() -> None:
        _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != guard:  # it died before the line above
            os._exit(137)

    try:
        child = subprocess.Popen(arguments[1:], stdin=subprocess.DEVNULL, preexec_fn=die_with_the_guard)
    except OSError as error:
        print(f"{arguments[1]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    code = _watch(child.pid, parent, woken)
    child.returncode = code  # reaped by _watch; kept until here, because a Popen that is dropped reaps its process itself
    return code


def _watch(child: int, parent: int, woken: int) -> int:
    """Waits until the child and every descendant have ended, ending them when it is time to; returns the child's exit code."""
    guard = os.getpid()
    code: int | None = None
    ending: int | None = None  # the signal to end everything with
    deadline: float | None = None  # when its grace is over
    told: set[int] = set()  # who has got it
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        with contextlib.suppress(ChildProcessError):  # nobody left to wait for
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    code = 128 - code if code < 0 else code
        if code is not None:
            if not _descendants(guard):
                return code
            ending = ending or signal.SIGTERM  # what outlives the command is ended as well
        if ending is not None:
            # Later only what became the guard's own child: its parent ended and nobody waits for it. What a process starts in
            # order to end well, such as a copy of its state, is left to do so.
            pids = _descendants(guard) if deadline is None else [pid for pid, owner, _ in _processes() if owner == guard]
            deadline = deadline or time.monotonic() + GRACE
            for pid in set(pids) - told:
                _signal(pid, ending)
            told.update(pids)
        if deadline is not None and (late := time.monotonic() - deadline) >= 0:
            for pid in _descendants(guard):
                _signal(pid, signal.SIGKILL)
            if late > UNKILLABLE:
                return 137 if code is None else code
        # Once a second without any event: for a parent that died while a fork of it still holds the pipe.
        for descriptor, _ in poll.poll(1000 if deadline is None else 20):
            if descriptor == woken:
                ending = ending or next((n for n in os.read(woken, 4096) if n != signal.SIGCHLD), None)
            elif not os.read(0, 4096):
                poll.unregister(0)
                ending = ending or signal.SIGTERM
        if os.getppid() != parent:
            ending = ending or signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
