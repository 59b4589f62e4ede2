"""What is known of a stack from outside."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil

from retune.local.record import MARKER, Process, Stack, held, lock, marked, owner, running


def stack(process: Process) -> Stack:
    return Stack(
        process,
        "2026-01-01T00:00:00+00:00",
        "http://127.0.0.1:1",
        "/h/airflow",
        "admin",
        "/h/passwords.json",
        "http://127.0.0.1:2",
        False,
        {},
    )


def test_a_process_id_that_was_used_again_is_not_the_same_process():
    me = Process.of(os.getpid())
    assert me.alive()
    assert not replace(me, created=me.created - 100).alive()


def test_a_zombie_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = Process.of(child.pid)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    assert not process.alive()
    child.wait()


def test_a_stack_is_running_while_its_supervisor_lives(settings):
    assert running(settings) is None
    mine = stack(Process.of(os.getpid()))
    mine.save(settings)
    assert running(settings) == mine
    assert (settings.home / "stack.json").stat().st_mode & 0o777 == 0o600


def test_a_stale_or_foreign_stack_file_is_no_stack(settings):
    stack(replace(Process.of(os.getpid()), created=1.0)).save(settings)
    assert running(settings) is None
    for text in ("", "[]", "{}", json.dumps({"supervisor": {"pid": 1}})):
        (settings.home / "stack.json").write_text(text)
        assert running(settings) is None


def test_one_process_at_a_time_holds_the_lock(settings):
    assert not held(settings)
    with lock(settings) as ours:
        assert ours
        assert held(settings)
        assert owner(settings) == Process.of(os.getpid())
        with lock(settings) as second:
            assert not second
    assert not held(settings)
    assert owner(settings) is None


def test_the_kernel_drops_the_lock_of_a_killed_process(settings):
    code = (
        "import sys, time\nfrom retune.settings import Settings\nfrom retune.local.record import lock\n"
        "with lock(Settings.load()) as ours:\n    print(ours, flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"RETUNE_PROJECT": str(settings.project)}
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    assert owner(settings) == Process.of(child.pid)
    child.kill()
    child.wait()
    child.stdout.close()
    assert not held(settings)


def test_processes_are_found_by_the_folder_they_belong_to(settings):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | {MARKER: str(settings.home)})
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | {MARKER: "/elsewhere"})
    try:
        deadline = time.monotonic() + 5  # between fork and exec the child still has our environment
        while not (found := marked(settings)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [process.pid for process in found] == [child.pid]
    finally:
        for process in (child, other):
            process.kill()
            process.wait()
