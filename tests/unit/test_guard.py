"""The guard: real processes, real signals. Each test names a file in its folder that every descendant holds open."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from retune import guard
from retune.guard import Guarded, run_guarded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are swept on Linux only (PR_SET_CHILD_SUBREAPER)")

STUBBORN = "trap '' TERM; while :; do sleep 0.1; done"
"""Shell text that ignores SIGTERM."""


def until(condition: Callable[[], object], seconds: float = 8.0) -> float:
    """Waits until the condition holds; returns how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not so after {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - start


def python(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


class Marked:
    """Processes started with this marker in their environment, whatever their parents and sessions are."""

    def __init__(self, marker: str) -> None:
        self.marker = marker
        self.env = {**os.environ, "RETUNE_TEST_GUARD": marker}

    def pids(self) -> set[int]:
        found = set()
        for process in psutil.process_iter():
            try:
                if process.environ().get("RETUNE_TEST_GUARD") == self.marker and process.status() != psutil.STATUS_ZOMBIE:
                    found.add(process.pid)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def marked(tmp_path: Path) -> Iterator[Marked]:
    processes = Marked(str(tmp_path))
    yield processes
    for pid in processes.pids():  # a failed test leaves nothing either
        os.kill(pid, signal.SIGKILL)


def double_forked(pid_file: Path) -> str:
    """Python text that leaves a daemon in a session of its own: its parent is gone, its group is its own, it ignores SIGTERM."""
    return f"""
        import os, pathlib, signal, sys, time
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))
                os.write(write, b"x")
                time.sleep(600)
            os._exit(0)
        os.read(read, 1)
        os.wait()
    """


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -15 $$"], 143),
        (["/no/such/command"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_exit_code_is_the_commands(command: list[str], code: int) -> None:
    assert run_guarded(command, on_line=lambda _: None) == code


def test_a_command_that_does_not_exist_is_named() -> None:
    lines: list[str] = []
    run_guarded(["/no/such/command"], on_line=lines.append)
    assert lines == ["/no/such/command: No such file or directory"]


def test_command_gets_folder_environment_and_no_input(tmp_path: Path) -> None:
    lines: list[str] = []
    assert (
        run_guarded(
            ["sh", "-c", 'pwd; echo "$WORD"; cat; echo end'], cwd=tmp_path, env={"WORD": "α", "PATH": os.defpath}, on_line=lines.append
        )
        == 0
    )
    assert lines == [str(tmp_path), "α", "end"]


def test_lines_end_in_newline_carriage_return_or_the_end_and_invalid_utf8_is_replaced() -> None:
    lines: list[str] = []
    command = python(r"""
        import os, time
        os.write(1, b"one\r\ntwo\r 10%\r 20%\nc")
        time.sleep(0.1)
        os.write(2, b"af\xc3")
        time.sleep(0.1)
        os.write(1, b"\xa9\r")
        time.sleep(0.1)
        os.write(1, b"\nbad \xff\n\nlast")
    """)
    assert run_guarded(command, on_line=lines.append) == 0
    assert lines == ["one", "two", " 10%", " 20%", "café", "bad \N{REPLACEMENT CHARACTER}", "", "last"]


def test_lines_come_as_they_are_written() -> None:
    seen: list[tuple[str, float]] = []
    run_guarded(
        python("import time; print('a', flush=True); time.sleep(1); print('b')"), on_line=lambda s: seen.append((s, time.monotonic()))
    )
    assert [line for line, _ in seen] == ["a", "b"]
    assert seen[1][1] - seen[0][1] > 0.7


def test_a_line_without_end_does_not_fill_the_memory() -> None:
    lengths: list[int] = []
    assert run_guarded(python("import sys; sys.stdout.write('x' * 1_000_000)"), on_line=lambda line: lengths.append(len(line))) == 0
    assert sum(lengths) == 1_000_000
    assert max(lengths) < 200_000


def test_output_goes_to_the_end_of_a_file(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("before\n")
    assert run_guarded(["sh", "-c", "echo out; echo err >&2"], output=log) == 0
    assert log.read_text() == "before\nout\nerr\n"
    with pytest.raises(ValueError, match="either output or on_line"):
        run_guarded(["true"], output=log, on_line=lambda _: None)


def test_a_missing_folder_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_guarded(["true"], cwd=tmp_path / "missing")


def test_what_the_command_leaves_behind_is_ended(tmp_path: Path, marked: Marked) -> None:
    pid_file = tmp_path / "pid"
    start = time.monotonic()
    assert run_guarded(python(double_forked(pid_file)), env=marked.env, on_line=lambda _: None) == 0
    assert int(pid_file.read_text()) > 0
    assert not marked.pids()
    assert 3.5 < time.monotonic() - start < 8  # it ignores SIGTERM, so it had its grace


def test_a_polite_leftover_ends_without_waiting_for_the_grace(marked: Marked) -> None:
    start = time.monotonic()
    assert run_guarded(["sh", "-c", "sleep 600 & setsid sleep 600 & exit 3"], env=marked.env) == 3
    assert not marked.pids()
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path, marked: Marked, number: signal.Signals) -> None:
    pid_file = tmp_path / "daemon"
    command = [*python(double_forked(pid_file) + "\n        os.execvp('sh', ['sh', '-c', 'sleep 600 | sleep 600'])")]
    parent = subprocess.Popen(python(f"from retune.guard import run_guarded\nrun_guarded({command!r})"), env=marked.env)
    until(lambda: pid_file.exists() and len(marked.pids()) >= 6)  # parent, guard, daemon, sh, two sleeps
    parent.send_signal(number)
    parent.wait()
    assert until(lambda: not marked.pids()) > 3  # the daemon ignores SIGTERM


def test_a_fork_of_the_parent_that_holds_the_pipe_does_not_keep_the_command(marked: Marked) -> None:
    parent = subprocess.Popen(
        python("""
            import os, time
            from retune.guard import Guarded
            guarded = Guarded.start(["sleep", "600"])
            if os.fork() == 0:
                os.setsid()
                os.environb  # holds the pipe's write end, as a forked worker would
                time.sleep(600)
            print(os.getpid(), flush=True)
            time.sleep(600)
        """),
        env=marked.env,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    until(lambda: len(marked.pids()) == 4)  # parent, its fork, guard, sleep
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: len(marked.pids()) == 1, 4)  # the fork alone


def test_an_exception_ends_the_command_before_it_goes_on(marked: Marked) -> None:
    def on_line(line: str) -> None:
        raise LookupError(line)

    start = time.monotonic()
    with pytest.raises(LookupError, match="ready"):
        run_guarded(["sh", "-c", "echo ready; setsid sleep 600"], env=marked.env, on_line=on_line)
    assert not marked.pids()
    assert time.monotonic() - start < 3.5  # by SIGTERM, not by waiting for the end of the grace


def test_a_signal_handler_that_raises_ends_a_stubborn_command_within_five_seconds(marked: Marked) -> None:
    class Terminated(Exception):
        pass

    def handler(*_: object) -> None:
        raise Terminated

    lines: list[str] = []
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        start = time.monotonic()
        with pytest.raises(Terminated):
            run_guarded(["sh", "-c", STUBBORN], env=marked.env, on_line=lines.append)
        assert 4.5 < time.monotonic() - start < 7  # 1 s until the signal, 4 s of grace
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not marked.pids()


def test_a_process_that_ends_well_may_start_others_for_it(tmp_path: Path, marked: Marked) -> None:
    saved = tmp_path / "saved"
    lines: list[str] = []
    command = ["sh", "-c", f"trap 'sleep 0.5; touch {saved}; exit 0' TERM; echo ready; while :; do :; done"]
    with Guarded.start(command, env=marked.env, on_line=lines.append) as guarded:
        while not lines:
            guarded.wait_for(0.05)
        assert guarded.stop() == 0
    assert saved.exists()


def test_last_words_are_heard_when_the_command_is_stopped() -> None:
    lines: list[str] = []
    command = ["sh", "-c", "trap 'echo checkpoint saved; exit 5' TERM; echo ready; while :; do sleep 0.05; done"]
    with Guarded.start(command, on_line=lines.append) as guarded:
        while not lines:
            assert guarded.wait_for(0.05) is None
        assert guarded.stop() == 5
    assert (lines[0], lines[-1]) == ("ready", "checkpoint saved")  # between them the shell tells that its sleep was ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_guard_reaches_the_command(tmp_path: Path, number: signal.Signals) -> None:
    ready = tmp_path / "ready"
    command = python(f"""
        import pathlib, signal, sys, time
        def bye(number, _): sys.exit(number)
        signal.signal(signal.SIGTERM, bye); signal.signal(signal.SIGINT, bye)
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(600)
    """)
    guarded = Guarded.start(command)
    until(ready.exists)
    os.kill(guarded.pid, number)
    assert guarded.wait_for(5) == number


def test_the_group_dies_with_a_killed_guard(tmp_path: Path, marked: Marked) -> None:
    started = tmp_path / "started"
    guarded = Guarded.start(["sh", "-c", f"(touch {started}; {STUBBORN}) & {STUBBORN}"], env=marked.env)
    until(started.exists)
    os.kill(guarded.pid, signal.SIGKILL)
    assert guarded.wait_for(5) == 137
    until(lambda: not marked.pids(), 2)


def test_a_killed_guard_is_noticed_though_its_output_stays_open(marked: Marked) -> None:
    lines: list[str] = []
    guarded = Guarded.start(["sh", "-c", f"echo ready; {STUBBORN}"], env=marked.env, on_line=lines.append)
    while not lines:
        guarded.wait_for(0.05)
    os.kill(guarded.pid, signal.SIGKILL)
    assert guarded.wait_for(5) == 137
    until(lambda: not marked.pids(), 2)


def test_the_command_dies_with_a_killed_guard_when_the_parent_is_gone_too(marked: Marked) -> None:
    parent = subprocess.Popen(
        python(
            "from retune.guard import Guarded; import time; g = Guarded.start(['sleep', '600']); print(g.pid, flush=True); time.sleep(600)"
        ),
        env=marked.env,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    guard_pid = int(parent.stdout.readline())
    until(lambda: len(marked.pids()) == 3)  # parent, guard, sleep
    os.kill(parent.pid, signal.SIGSTOP)  # neither of the two gets to act on the other's end
    os.kill(guard_pid, signal.SIGKILL)
    until(lambda: marked.pids() == {parent.pid}, 2)
    parent.kill()
    parent.wait()
    parent.stdout.close()


def test_a_guard_that_hangs_is_killed_with_all_it_holds(tmp_path: Path, marked: Marked) -> None:
    pid_file = tmp_path / "daemon"
    guarded = Guarded.start(python(double_forked(pid_file) + "\n        time.sleep(600)"), env=marked.env)
    until(pid_file.exists)
    os.kill(guarded.pid, signal.SIGSTOP)
    start = time.monotonic()
    assert guarded.stop() == 137
    assert 4.4 < time.monotonic() - start < 6
    until(lambda: not marked.pids(), 2)


def test_poll_tells_running_from_ended_and_stop_is_harmless_after_the_end(marked: Marked) -> None:
    guarded = Guarded.start(["sleep", "600"], env=marked.env)
    assert guarded.poll() is None
    assert guarded.wait_for(0.05) is None
    assert guarded.stop() == 143
    assert [guarded.stop(), guarded.poll(), guarded.wait()] == [143, 143, 143]
    assert not marked.pids()


def test_a_dropped_command_ends(marked: Marked) -> None:
    with pytest.warns(ResourceWarning, match="still running"):
        Guarded.start(["sleep", "600"], env=marked.env)
    until(lambda: not marked.pids(), 3)


def test_an_exit_code_that_somebody_else_took_is_not_success() -> None:
    guarded = Guarded.start(["true"])
    os.waitpid(guarded.pid, 0)
    assert guarded.wait() == 255


def test_usage_is_told_without_a_command() -> None:
    result = subprocess.run([sys.executable, "-m", "retune.guard", "sleep"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "usage: python -m retune.guard -- COMMAND ...\n")


def test_ps_and_proc_tell_the_same() -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as sleeper:
        mine = (sleeper.pid, os.getpid(), sleeper.pid)
        assert mine in guard._processes()
        assert mine in guard._processes_by_ps()
        sleeper.kill()
    assert mine not in guard._processes()
