"""What a retrain run costs when nothing is new, against an empty DAG of as many tasks, on the embedded stack.

Airflow's own figures (start to end of a DAG run), interleaved; then again with 10,000 foreign sections in the store.
"""

import contextlib
import io
import json
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rows import Row, of_rounds, ratios

from retune.local import start, stop
from retune.local.airflow_api import FINISHED, Airflow
from retune.local.rounds import connect
from retune.settings import Settings

ROOT = Path(__file__).parents[1]
PROMPT = "ticket_priority"
ROUNDS = 3
SHORT, REPEATED = ("empty_1", "nothing new"), 5
"""A run ends with a turn of Airflow's scheduler, every half second: of runs that take one or two turns, a round has the mean of some."""
FOREIGN = 10_000
"""Sections of other prompts in the store's index."""
EMPTY = '''
from airflow.sdk import dag, task

@dag(dag_id="empty_1", schedule=None)
def one():
    @task
    def only():
        return {}
    only()

@dag(dag_id="empty_all", schedule=None)
def every():
    """As many tasks as a forced run has, with the same edges."""
    @task
    def first(): return {}
    @task
    def preprocess(x): return {}
    @task
    def plan(x): return [0] * TRIALS
    @task
    def tune(run, trial): return {}
    @task
    def select(run, x): return [0] * RELEASES
    @task
    def evaluate(run, x): return {}
    @task
    def measure(run, x): return {}
    @task
    def decide(run, x, y): return {}
    @task
    def approve(x): return {}
    @task
    def promote(x, y): return {}
    run = preprocess(first())
    evaluated = evaluate.partial(run=run).expand(x=select(run, tune.partial(run=run).expand(trial=plan(run))))
    decided = decide(run, evaluated, measure(run, evaluated))
    promote(decided, approve(decided))

one(), every()
'''


def seconds(airflow: Airflow, dag: str, conf: dict[str, Any]) -> float:
    """Start to end of one run. Raises RuntimeError if it fails."""
    run_id = f"bench_{secrets.token_hex(6)}"
    airflow.trigger(dag, run_id, conf)
    while (run := airflow.run(dag, run_id))["state"] not in FINISHED:
        time.sleep(0.3)
    if run["state"] != "success":
        raise RuntimeError(f"{dag} {run_id} failed; see its tasks' logs")
    return (datetime.fromisoformat(run["end_date"]) - datetime.fromisoformat(run["start_date"])).total_seconds()


@contextmanager
def installation() -> Iterator[Settings]:
    """A stack of its own, with one batch decided on."""
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as temporary:
        scratch = Path(temporary)
        landing, prompts, dags = scratch / "landing", scratch / "prompts", scratch / "dags"
        prompts.mkdir()
        shutil.copytree(ROOT / f"examples/batches/{PROMPT}/1", landing)
        shutil.copytree(ROOT / "dags", dags)
        prompt = yaml.safe_load((ROOT / f"prompts/{PROMPT}.yaml").read_text("utf-8"))
        prompt["source"]["path"], prompt["tune"]["epochs"] = str(landing), 1
        prompt["schedule"] = {"on_new_data": False}
        (prompts / f"{PROMPT}.yaml").write_text(yaml.safe_dump(prompt, sort_keys=False), "utf-8")
        (dags / "empty_dags.py").write_text(EMPTY.replace("TRIALS", str(len(prompt["trials"]) + 1)).replace("RELEASES", "3"), "utf-8")
        os.environ |= {
            "RETUNE_PROJECT": str(ROOT),
            "RETUNE_HOME": str(scratch / "home"),
            "RETUNE_PROMPTS": str(prompts),
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        }
        settings = Settings.load()
        try:
            yield settings
        finally:
            stop(settings)


def ratio(case: str, many: list[float], empty: list[float]) -> Row:
    return ratios("nothing new", f"{case} ({statistics.median(many):.1f} s / {statistics.median(empty):.1f} s)", many, empty)


def against_empty(airflow: Airflow, where: str, rounds: int) -> list[Row]:
    cases = {
        "empty_1": ("empty_1", {}),
        "nothing new": (f"retrain_{PROMPT}", {}),
        "empty_all": ("empty_all", {}),
        "forced": (f"retrain_{PROMPT}", {"force": True}),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        runs: dict[str, list[float]] = {name: [] for name in cases}
        for name in [*SHORT * REPEATED, "empty_all", "forced"]:
            dag, conf = cases[name]
            runs[name].append(seconds(airflow, dag, conf))
        for name, each in runs.items():
            found[name].append(statistics.mean(each))
    return [
        ratio(f"a run with nothing to do / an empty DAG of the one task that runs{where}", found["nothing new"], found["empty_1"]),
        ratio(f"a forced run, all restored / an empty DAG of as many tasks{where}", found["forced"], found["empty_all"]),
    ]


def parts(url: str) -> dict[str, Any]:
    """Where the seconds of a forced run's tasks go, by calling them one after the other in this process."""
    os.environ["MLFLOW_TRACKING_URI"] = url
    from retune.records import Trigger
    from retune.registry import Registry
    from retune.tasks import retrain, verdict
    from retune.tasks.measure import measure
    from retune.tasks.resolve import resolve
    from retune.tracking import Tracker
    from retune.workspace import Workspaces

    spent = {"MLflow": 0.0, "DVC and store": 0.0}
    depth = 0

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal depth
            depth, start = depth + 1, time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                depth -= 1
                if depth == 0:
                    spent[part] += time.perf_counter() - start

        return call

    for owner, part in ((Tracker, "MLflow"), (Registry, "MLflow"), (Workspaces, "DVC and store")):
        for name, function in list(vars(owner).items()):
            if callable(function) and not name.startswith("_") and name != "working":
                setattr(owner, name, timed(function, part))
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run = resolve(PROMPT, Trigger("bench", f"parts {secrets.token_hex(4)}", "manual", "bench", "").to_json(), force=True)
        run = retrain.preprocess(run or {})
        tuned = [retrain.tune(run, trial) for trial in retrain.plan(run)]
        evaluated = [retrain.evaluate(run, one) for one in retrain.select(run, tuned)]
        verdict.decide(run, evaluated, measure(run, evaluated))
    total = time.perf_counter() - begun
    return {**spent, "reading, comparing, plotting": total - sum(spent.values()), "in all": total}


def measure(quick: bool) -> list[Row]:
    rounds, foreign = (1, 10) if quick else (ROUNDS, FOREIGN)
    with installation() as settings:
        stack, _ = start(settings)
        airflow = connect(stack)
        airflow.wait_for_dag("empty_all", 120)
        seconds(airflow, "ingest", {})
        seconds(airflow, f"retrain_{PROMPT}", {})
        seconds(airflow, f"retrain_{PROMPT}", {"force": True})  # the second comparison is with the champion that the first made
        rows = against_empty(airflow, "", rounds)
        index = Path(settings.store) / "sections"
        for number in range(foreign):
            place = index / f"foreign_{number % 20}/tune/{secrets.token_hex(32)}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps({"cmd": "x", "outs": []}))
        rows += against_empty(airflow, f", {foreign:,} foreign sections in the store", rounds)
        split = parts(stack.mlflow_url)
    for part, spent in split.items():
        rows.append(of_rounds("forced run's tasks", part, [spent], "s"))
    return rows
