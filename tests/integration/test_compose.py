"""The production stack of docker-compose.yml, executed: Postgres, Redis, Celery with two workers for trials, MLflow and S3 (compose_stack).

One loop over both example prompts, from a landing zone on S3 to a champion; every test looks at what it left behind.
"""

import base64
import csv
import io
import json
import re
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from checkouts import ROOT
from compose_file import ComposeError, interpolate, read_compose
from compose_mapping import Addresses, Paths
from compose_stack import Stack, compose_variables

from retune.ledger import Entry, Ledger
from retune.local.airflow_api import FINISHED, TaskState
from retune.local.http import Refused, request
from retune.production.secrets import SECRETS
from retune.store import S3Store, s3_client

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]
PROMPTS = ("ticket_priority", "ticket_summary")
FIRST, SUMMARY = PROMPTS
WITHIN = 1100.0
"""Seconds that all runs together may take on a busy machine of two cores: with the start less than the marker's, whose end of a test says
nothing of what was waited for."""


@dataclass(frozen=True)
class Loop:
    """What was run, and a client of what ran it."""

    stack: Stack
    runs: dict[str, str]
    """Prompt -> the run that new data started."""
    forced: str
    """The run of the first prompt that was forced afterwards."""

    def tasks(self, prompt: str, run: str | None = None) -> list[TaskState]:
        return self.stack.api().tasks(f"retrain_{prompt}", run or self.runs[prompt])

    def log(self, prompt: str, run: str) -> list[str]:
        """Everything that the tasks of a run wrote, by Airflow's API."""
        api = self.stack.api()
        return [line for task in self.tasks(prompt, run) for line in api.log_lines(f"retrain_{prompt}", run, task)]


@pytest.fixture(scope="module")
def loop(compose: Stack) -> Iterator[Loop]:
    """Data land and are taken in, prompt after prompt, while the first one's trials already run; then one run is forced."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compose.variables("worker-default").items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        yield looped(compose)


def looped(compose: Stack) -> Loop:
    deadline = time.monotonic() + WITHIN
    api = compose.api()
    runs = {}
    for name in PROMPTS:
        land(compose, name)
        api.wait_for_dag("ingest")
        api.trigger("ingest", f"test-{name}", {})
        (runs[name],) = wait_until(
            lambda n=name: api.runs_since(f"retrain_{n}", datetime.fromisoformat("2026-01-01T00:00:00+00:00")), deadline
        )
        runs[name] = runs[name]["dag_run_id"]
        if name == FIRST:
            wait_until(lambda: trials(api.tasks(f"retrain_{FIRST}", runs[FIRST])), deadline)
    forced = "test-forced"
    finished(compose, FIRST, runs[FIRST], deadline)
    api.trigger(f"retrain_{FIRST}", forced, {"force": True, "reason": "restore all"})
    finished(compose, SUMMARY, runs[SUMMARY], deadline)
    finished(compose, FIRST, forced, deadline)
    return Loop(compose, runs, forced)


def land(stack: Stack, name: str) -> None:
    """The example's first batch, of the summaries only as many rows as start a run."""
    s3 = client(stack)
    if "landing" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
        s3.create_bucket(Bucket="landing")
    for file in sorted((ROOT / "examples/batches" / name / "1").iterdir()):
        content = file.read_bytes()
        if name == SUMMARY:
            rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))[:241]
            text = io.StringIO(newline="")
            csv.writer(text).writerows(rows)
            content = text.getvalue().encode("utf-8")
        s3.put_object(Bucket="landing", Key=f"{name}/{file.name}", Body=content)


def client(stack: Stack) -> Any:
    return s3_client(stack.address("object-store", 9000))


def ledger(stack: Stack, name: str) -> list[Entry]:
    return Ledger(store(stack), name).entries()


def store(stack: Stack) -> S3Store:
    return S3Store(stack.variables("worker-default")["RETUNE_STORE"], stack.address("object-store", 9000))


def trials(tasks: list[TaskState]) -> list[TaskState]:
    return [task for task in tasks if task.task == "tune" and task.started]


def finished(stack: Stack, name: str, run: str, deadline: float) -> None:
    dag = f"retrain_{name}"
    state = wait_until(lambda: (s := stack.api().run(dag, run)["state"]) in FINISHED and s, deadline)
    if state != "success":
        failed = [task for task in stack.api().tasks(dag, run) if task.state == "failed"]
        said = [f"{task.label}:\n" + "\n".join(stack.api().log_lines(dag, run, task)[-30:]) for task in failed]
        pytest.fail(f"{dag} ended {state}\n" + "\n".join(said))


def wait_until(condition: Any, deadline: float) -> Any:
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {WITHIN:.0f} s of the first file's landing"
        time.sleep(1)
    return value


def test_new_data_lead_to_a_champion(loop: Loop) -> None:
    """In the ledger on S3, by a run that ingest's Asset started."""
    entries = ledger(loop.stack, FIRST)
    promoted = next(entry for entry in entries if entry.kind == "promote")
    assert (promoted.by, promoted.body["triggered"]["dag_run_id"]) == ("asset_triggered", loop.runs[FIRST])
    assert promoted.body["decision"]["verdict"] == "PROMOTE"
    assert promoted.body["candidate"]["metrics"]["macro_f1"] > promoted.body["champion_before"]["metrics"]["macro_f1"] + 0.2
    decided = [entry for entry in ledger(loop.stack, SUMMARY) if entry.kind in ("promote", "hold", "reject")]
    assert [entry.body["triggered"]["dag_run_id"] for entry in decided] == [loop.runs[SUMMARY]]
    for name in (*PROMPTS, "dataset"):
        Ledger(store(loop.stack), name).verify()


def test_the_alias_names_the_release_to_whoever_logs_in(loop: Loop) -> None:
    place = f"{loop.stack.address('mlflow', 5000)}/api/2.0/mlflow/registered-models/alias?name={FIRST}&alias=champion"
    with pytest.raises(Refused, match="401"):
        request(place)
    version = mlflow(loop.stack, f"registered-models/alias?name={FIRST}&alias=champion")["model_version"]
    tags = {tag["key"]: tag["value"] for tag in version["tags"]}
    champion = ledger(loop.stack, FIRST)[-1].body["champion"]
    assert (tags["retune.release"], version["version"]) == (champion["release"], champion["version"])


def mlflow(stack: Stack, call: str) -> Any:
    variables = stack.variables("worker-default")
    pair = f"{variables['MLFLOW_TRACKING_USERNAME']}:{variables['MLFLOW_TRACKING_PASSWORD']}"
    asked = urllib.request.Request(f"{stack.address('mlflow', 5000)}/api/2.0/mlflow/{call}")
    asked.add_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.load(answer)


def test_trials_ran_at_the_same_time_on_two_workers(loop: Loop) -> None:
    """By Airflow's own records."""
    path = f"dags/retrain_{FIRST}/dagRuns/{quote(loop.runs[FIRST], safe='')}/taskInstances?limit=100"
    tuned = [task for task in loop.stack.ask(path)["task_instances"] if task["task_id"] == "tune"]
    assert len(tuned) == 2
    assert {task["queue"] for task in tuned} == {"gpu"}
    assert {task["hostname"] for task in tuned} == {"worker-gpu-1", "worker-gpu-2"}
    starts, ends = zip(
        *((datetime.fromisoformat(task["start_date"]), datetime.fromisoformat(task["end_date"])) for task in tuned), strict=True
    )
    assert max(starts) < min(ends), "they overlap"


def test_logs_of_tasks_are_read_from_s3(loop: Loop) -> None:
    """By the api-server, which shares no folder with the workers that wrote them."""
    tune = next(task for task in loop.tasks(FIRST) if task.task == "tune")
    assert any("Running stage" in line for line in loop.stack.api().log_lines(f"retrain_{FIRST}", loop.runs[FIRST], tune))
    keys = objects(loop.stack, "airflow-logs")
    for name in PROMPTS:
        found = [key for key in keys if f"dag_id=retrain_{name}/run_id={loop.runs[name]}/" in key and "task_id=tune/" in key]
        # Each try has a file of its own.
        assert {re.findall(r"map_index=(\d+)", key)[0] for key in found} == {str(task.map_index) for task in trials(loop.tasks(name))}
    deadline = time.monotonic() + 60  # a log goes to S3 after its task has ended, and the last one ended just now
    while kept := [path for each in loop.stack.of("worker-gpu") for path in each.root.rglob("*.log") if "task_id=" in str(path)]:
        assert time.monotonic() < deadline, f"kept on a worker too: {kept}"
        time.sleep(1)


def objects(stack: Stack, bucket: str) -> list[str]:
    pages = client(stack).get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [item["Key"] for page in pages for item in page.get("Contents", ())]


def test_no_stage_ran_twice(loop: Loop) -> None:
    """Each recorded section was executed by one worker, once; a forced run restores every one of them, whatever worker it is on."""
    for name in PROMPTS:
        ran = Counter(re.findall(r"Running stage '(\w+)@", "\n".join(loop.log(name, loop.runs[name]))))
        recorded = Counter(key.split("/")[2] for key in store(loop.stack).list(f"sections/{name}/"))
        del recorded["resolve"]  # is laid, never run
        assert ran == recorded
        assert (ran["preprocess"], ran["tune"]) == (1, len(trials(loop.tasks(name))) + 1), "the template alone is a release too"
    log = "\n".join(loop.log(FIRST, loop.forced))
    assert "Running stage" not in log
    restored = Counter(re.findall(r"(\w+)@\w+: restored by key", log))
    assert (restored["preprocess"], restored["tune"]) == (1, 2)
    assert restored["evaluate"] >= 2
    last = ledger(loop.stack, FIRST)[-1]
    assert (last.body["triggered"]["dag_run_id"], last.body["triggered"]["reason"]) == (loop.forced, "restore all")


def test_no_secret_is_written_anywhere(loop: Loop) -> None:
    """Not in what the services print, the logs of tasks, the store, MLflow's or Airflow's database (XCom among it), or an answer."""
    planted = {name: loop.stack.given[name] for name in SECRETS if name != "OBJECT_STORE_ACCESS_KEY"}  # a name, no secret
    assert len(planted) >= 10
    api = loop.stack.api()
    places: dict[str, bytes] = {}
    for path in (loop.stack.folder / "logs").iterdir():
        places[f"output of {path.name}"] = path.read_bytes()
    s3 = client(loop.stack)
    for bucket in ("airflow-logs", "retune", "mlflow", "landing"):
        for key in objects(loop.stack, bucket):
            places[f"s3://{bucket}/{key}"] = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    for database in ("airflow", "celery", "mlflow"):
        places[f"database {database}"] = dumped(loop.stack, database)
    asked = ["config", "connections", "variables", "dags", "pools", "providers", "plugins", "eventLogs?limit=1000", "importErrors"]
    for name in PROMPTS:
        run = f"dags/retrain_{name}/dagRuns/{quote(loop.runs[name], safe='')}"
        asked += [
            run,
            f"{run}/taskInstances",
            *(f"{run}/taskInstances/{task.task}/xcomEntries" for task in loop.tasks(name) if task.map_index < 0),
        ]
        places[f"logs of {name}"] = "\n".join(loop.log(name, loop.runs[name])).encode()
    for path in asked:
        try:
            places[f"GET {path}"] = json.dumps(loop.stack.ask(path)).encode()
        except Refused as refused:
            places[f"GET {path}"] = refused.text.encode()
    assert b"return_value" in places["database airflow"], "XCom was looked at"
    found = [(name, place) for place, content in places.items() for name, secret in planted.items() if secret.encode() in content]
    assert found == []
    assert len(places) > 100, len(places)
    assert api.run(f"retrain_{FIRST}", loop.forced)["state"] == "success", "and it all still answers"


def dumped(stack: Stack, database: str) -> bytes:
    """A whole database as text."""
    variables = stack.variables("postgres")
    environment = {**variables, "PGUSER": variables["POSTGRES_USER"], "PGPASSWORD": variables["POSTGRES_PASSWORD"]}
    done = subprocess.run(["pg_dump", "--dbname", database], env=environment, capture_output=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A-${A}", "a-a"),
        ("$$A $${A}", "$A ${A}"),
        ("${NO:-b} ${EMPTY:-c} ${EMPTY-d} ${NO-e}", "b c  e"),
        ("${NO:-${A}!} ${A:+x} ${NO:+x}", "a! x "),
        ("redis://:${A}@redis:6379/0", "redis://:a@redis:6379/0"),
    ],
)
def test_variables_are_put_in_as_compose_does(text: str, value: str) -> None:
    assert interpolate(text, {"A": "a", "EMPTY": ""}) == value


def test_names_ports_and_paths_become_those_of_this_machine(tmp_path: Path) -> None:
    """And nothing else does: a bucket or a user of a service's name stays, and another service's use of the same number."""
    addresses = Addresses(read_compose(ROOT / "docker-compose.yml", compose_variables(tmp_path / ".env")))
    mlflow, postgres, api = addresses.port("mlflow", 5000), addresses.port("postgres", 5432), addresses.port("api-server", 8080)
    login = "postgresql://mlflow:5000word"
    for service, written, expected in (
        ("worker-gpu", "http://mlflow:5000/health", f"http://127.0.0.1:{mlflow}/health"),
        ("worker-gpu", "http://127.0.0.1:8080", f"http://127.0.0.1:{api}"),
        ("scheduler", f"{login}@postgres:5432/mlflow", f"{login}@127.0.0.1:{postgres}/mlflow"),
        ("mlflow", "--port=5000", f"--port={mlflow}"),
        ("scheduler", "--port=5000", "--port=5000"),
        ("mlflow", "--allowed-hosts=mlflow:5000,localhost:*", f"--allowed-hosts=127.0.0.1:{mlflow},localhost:*"),
        ("mlflow", "s3://mlflow/artifacts", "s3://mlflow/artifacts"),
        ("api-server", "0.0.0.0", "127.0.0.1"),
        ("api-server", "86400", "86400"),
    ):
        assert addresses.rewritten(written, service) == expected
    assert addresses.environment({"PGHOST": "postgres", "PGPORT": "5432"}) == {"PGHOST": "127.0.0.1", "PGPORT": str(postgres)}
    assert addresses.port("worker-gpu", 5000, 1) != addresses.port("worker-gpu", 5000, 2)
    paths = Paths.of(tmp_path, ["/opt/retune", "/data"])
    assert paths.rewritten("posix /data") == f"posix {tmp_path}/data"
    assert paths.rewritten("sqlite:////opt/retune/a.db:/opt/retune") == f"sqlite:///{tmp_path}/opt/retune/a.db:{tmp_path}/opt/retune"
    assert paths.rewritten("s3://bucket/data /opt/retune2") == "s3://bucket/data /opt/retune2"


def test_the_file_starts_nothing_without_its_secrets(tmp_path: Path) -> None:
    variables = compose_variables(tmp_path / ".env")
    wanted = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    assert wanted <= set(variables)
    for name in wanted:
        without = {key: value for key, value in variables.items() if key != name}
        with pytest.raises(ComposeError, match=f"{name} is missing a value: .*make secrets"):
            read_compose(ROOT / "docker-compose.yml", without)


def test_only_the_two_web_pages_are_published(tmp_path: Path) -> None:
    services = read_compose(ROOT / "docker-compose.yml", compose_variables(tmp_path / ".env")).services
    published = {name: service.published for name, service in services.items() if service.published}
    assert set(published) == {"mlflow", "api-server"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
