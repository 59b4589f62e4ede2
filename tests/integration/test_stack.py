"""The embedded stack: real processes of Airflow and MLflow, started and stopped in a folder of its own."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from retune.errors import RetuneError
from retune.local import Stack, running, start, stop
from retune.local.airflow_api import Airflow
from retune.local.files import read_json
from retune.local.http import Refused, answers, request
from retune.local.record import marked, owner
from retune.settings import Settings

pytestmark = pytest.mark.integration

DAG = """
import os, subprocess, sys, time
from airflow.sdk import dag, task

@dag(dag_id="hello", schedule=None)
def hello():
    @task
    def names():
        return ["a", "b"]

    @task(pool="gpu", map_index_template="{{ task.op_kwargs['name'] }}")
    def greet(name):
        print("hello", name, os.environ["MLFLOW_TRACKING_URI"])
        return name

    greet.expand(name=names())

@dag(dag_id="long", schedule=None)
def long():
    @task
    def sleep():
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)

    sleep()

hello()
long()
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "my_dags").mkdir()
    (tmp_path / "my_dags" / "hello.py").write_text(DAG)
    for name in [name for name in os.environ if name.startswith(("RETUNE_", "AIRFLOW", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RETUNE_PROJECT", str(tmp_path))
    monkeypatch.setenv("RETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AIRFLOW__CORE__DAGS_FOLDER", str(tmp_path / "my_dags"))
    found = Settings.load()
    yield found
    stop(found)


def wait_until(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return value


def processes(settings: Settings) -> list[psutil.Process]:
    return marked(settings)


def airflow(stack: Stack) -> Airflow:
    return Airflow(stack.airflow_url, stack.user, stack.password)


def finish(client: Airflow, dag: str, run_id: str, seconds: float = 240) -> str:
    client.wait_for_dag(dag)
    client.trigger(dag, run_id, {})
    return wait_until(lambda: (state := client.run(dag, run_id)["state"]) in ("success", "failed") and state, seconds)


def test_life_of_a_stack(settings):
    """One start for everything that a running stack shows, since a start takes a while."""
    events = []
    begun = time.monotonic()
    stack, started = start(settings, events.append)
    first_start = time.monotonic() - begun
    assert started
    assert {e.get("component") for e in events} >= {"mlflow", "api-server", "scheduler", "dag-processor", "triggerer"}
    assert {e["event"] for e in events} == {"migrating", "healthy"}

    # Health, and who may ask.
    health = request(f"{stack.airflow_url}/api/v2/monitor/health")
    assert {part: health[part]["status"] for part in health} == dict.fromkeys(
        ("metadatabase", "scheduler", "triggerer", "dag_processor"), "healthy"
    )
    assert answers(f"{stack.mlflow_url}/health")
    with pytest.raises(Refused, match="401"):
        request(f"{stack.airflow_url}/api/v2/dags")

    # Private, and on this machine alone.
    for path in settings.home.rglob("*"):
        if path.is_file() and "airflow/logs/" not in str(path):
            assert path.stat().st_mode & 0o077 == 0, path
    assert Path(stack.password_file).stat().st_mode & 0o777 == 0o600
    listening = {c.laddr for p in processes(settings) for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == {int(url.rpartition(":")[2]) for url in (stack.airflow_url, stack.mlflow_url)}
    password = stack.password
    assert all(password not in path.read_text(errors="replace") for path in (settings.home / "logs").iterdir())

    # Up again is the same stack.
    assert start(settings) == (stack, False)

    # A run with mapped tasks in the pool.
    client = airflow(stack)
    assert finish(client, "hello", "r1") == "success"
    tasks = client.tasks("hello", "r1")
    assert [t.label for t in tasks if t.task == "names"] == ["names"]
    assert sorted(t.label for t in tasks if t.task == "greet") == ["greet [a]", "greet [b]"]
    greeted = next(t for t in tasks if t.label == "greet [a]")
    assert f"hello a {stack.mlflow_url}" in client.log_lines("hello", "r1", greeted)
    assert [r["dag_run_id"] for r in client.runs_since("hello", datetime(2026, 1, 1, tzinfo=UTC))] == ["r1"]

    # A component that dies comes back.
    guard = psutil.Process(stack.components["triggerer"]["pid"])
    guard.children()[0].kill()
    again = wait_until(lambda: (s := running(settings)) and s.components["triggerer"]["restarts"] == 1 and s, 60)
    assert again.components["triggerer"]["pid"] != guard.pid

    # Down leaves nothing, and is harmless the second time.
    begun = time.monotonic()
    assert stop(settings)
    stopped = time.monotonic() - begun
    assert processes(settings) == []
    assert running(settings) is None
    assert not answers(f"{stack.airflow_url}/api/v2/version")
    assert not stop(settings)

    # The next start is quicker: the database is made; and what was run is still there.
    begun = time.monotonic()
    stack, started = start(settings, events.append)
    second_start = time.monotonic() - begun
    assert started
    assert [e["event"] for e in events].count("migrating") == 1
    assert stack.password == password
    assert airflow(stack).run("hello", "r1")["state"] == "success"
    print(f"first start {first_start:.1f} s, second {second_start:.1f} s, stop {stopped:.1f} s")


def test_a_killed_supervisor_leaves_no_process_and_no_obstacle(settings):
    """Not even what a task started in a session of its own."""
    stack, _ = start(settings)
    client = airflow(stack)
    client.wait_for_dag("long")
    client.trigger("long", "r1", {})
    sleeper = wait_until(lambda: next((p for p in processes(settings) if "import time; time.sleep(600)" in p.cmdline()), None), 180)
    os.kill(stack.supervisor.pid, signal.SIGKILL)
    wait_until(lambda: not processes(settings), 15)
    assert not sleeper.is_running()
    assert running(settings) is None
    assert owner(settings) is None
    stack, started = start(settings)
    assert started


def test_two_starts_at_once_make_one_stack(settings):
    code = "from retune.local import start\nfrom retune.settings import Settings\nprint(start(Settings.load()))"
    starters = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [starter.communicate(timeout=400)[0] for starter in starters]
    assert [starter.returncode for starter in starters] == [0, 0]
    assert len({re.search(r"pid=(\d+)", text).group(1) for text in said}) == 1
    assert sorted("True)" in text.rsplit(",", 1)[1] for text in said) == [False, True]


@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, "mlflow"), (signal.SIGKILL, "triggerer")])
def test_an_interrupted_start_leaves_nothing(settings, number, after):
    starter = subprocess.Popen(
        [sys.executable, "-m", "retune.cli", "up"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A shell's background jobs, this test among them, have SIGINT ignored, and so would the starter.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = settings.home / "logs" / f"{after}.log"
    wait_until(log.exists, 60)
    time.sleep(0.5)
    starter.send_signal(number)
    output = starter.communicate(timeout=30)[0].decode()
    wait_until(lambda: not processes(settings), 15)
    assert running(settings) is None
    if number == signal.SIGINT:
        assert starter.returncode == 130
        assert "Traceback" not in output


def test_a_start_that_fails_names_the_component_its_log_and_stops_the_rest(settings, monkeypatch):
    monkeypatch.setenv("AIRFLOW__TRIGGERER__CAPACITY", "not a number")
    with pytest.raises(RetuneError, match="triggerer ended with exit code") as caught:
        start(settings)
    assert str(settings.home / "logs" / "triggerer.log") in str(caught.value)
    assert "capacity" in str(caught.value).lower()
    wait_until(lambda: not processes(settings), 15)
    assert running(settings) is None


def test_a_port_that_is_taken_at_the_last_moment_is_replaced(settings):
    """As when the stacks of two folders start at the same time."""
    with socket.socket() as thief, ThreadPoolExecutor(1) as aside:

        def steal() -> int:
            ports = wait_until(lambda: read_json(settings.home / "ports.json"), 60)
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", ports["mlflow"]))
            thief.listen()
            return ports["mlflow"]

        stealing = aside.submit(steal)
        stack, _ = start(settings)
        taken = stealing.result()
    assert not stack.mlflow_url.endswith(f":{taken}")
    assert answers(f"{stack.mlflow_url}/health")


def test_an_mlflow_server_that_does_not_answer_is_named(settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(RetuneError, match=r"http://127\.0\.0\.1:9, which does not answer"):
        start(settings)


def test_leftovers_of_a_killed_stack_end_before_the_next_start(settings):
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=os.environ | {"RETUNE_STACK": str(settings.home)})
    with contextlib.suppress(subprocess.TimeoutExpired):
        left.wait(0.5)
    assert stop(settings)
    assert not psutil.pid_exists(left.pid)
