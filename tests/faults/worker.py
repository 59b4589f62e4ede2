"""One task in a process of its own, as a worker runs it: `python worker.py ORDER.json`. It may be told to die, or to wait, at a point.

ORDER: {"task": name, "arguments": [...], "named": {...}, "result": file, "points": [...]}. A point is a function that the task comes by:

    {"place": "retune.registry:Registry.project", "when": "before", "call": 1, "do": "kill", "seconds": 0}

`when`: before or after the call of that number. `do`: "kill" ends the process by SIGKILL, after so many seconds in which it goes on; "wait"
makes the file `file` + ".reached" and goes on when there is one called `file` + ".go". Nothing else of the task is touched.
"""

import functools
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def arm(point: dict[str, Any]) -> None:
    module, _, name = point["place"].partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, last), 0

    @functools.wraps(function)
    def passed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == point.get("call", 1)
        if now and point["when"] == "before":
            act(point)
        result = function(*arguments, **named)
        if now and point["when"] == "after":
            act(point)
        return result

    setattr(owner, last, passed)


def act(point: dict[str, Any]) -> None:
    print(f"reached {point['when']} {point['place']}", flush=True)
    if point["do"] == "wait":
        Path(point["file"] + ".reached").touch()
        while not Path(point["file"] + ".go").exists():
            time.sleep(0.01)
    elif seconds := point.get("seconds", 0):
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def ingest(name: str, run_id: str) -> Any:
    from retune.tasks.ingest import ingest

    return ingest(name, run_id, "tester")


def stage(name: str, prompt: str, lineage: dict[str, Any]) -> Any:
    """A stage through its workspace, without MLflow: [lineage, restored]."""
    from retune.config import load_prompt
    from retune.records import Lineage
    from retune.settings import Settings
    from retune.workspace import Workspaces

    settings = Settings.load()
    loaded = load_prompt(settings.prompts / f"{prompt}.yaml")
    done = Workspaces(settings).run(name, loaded, Lineage.from_json(lineage))
    return [done.lineage.to_json(), done.restored]


def lineage() -> Any:
    """That of the live dataset revision."""
    from retune.ledger import Ledger
    from retune.settings import Settings
    from retune.workspace import Workspaces

    workspaces = Workspaces(Settings.load())
    head = Ledger(workspaces.store, "dataset").head()
    return workspaces.lineage(head.body["data"], head.n).to_json() if head else None


def append(name: str, by: str, count: int, pause: float = 0.0) -> Any:
    """So many entries, each decided on the head of its moment and decided again where somebody else was first: their numbers."""
    from retune.errors import ConflictError
    from retune.ledger import Ledger
    from retune.settings import Settings
    from retune.store import open_store

    ledger = Ledger(open_store(Settings.load()), name)
    mine = {entry.body["dag_run_id"] for entry in ledger.entries()}
    for run_id in (f"{by}-{number}" for number in range(count)):
        while run_id not in mine:
            time.sleep(pause)
            try:
                ledger.append(
                    "promote",
                    by,
                    "a fault scenario",
                    {"champion": {"release": run_id, "version": "1"}, "dag_run_id": run_id},
                    ledger.head(),
                )
                mine.add(run_id)
            except ConflictError:
                mine |= {entry.body["dag_run_id"] for entry in ledger.entries()}
    return sorted(mine)


def resolve(name: str, trigger: dict[str, Any], **wanted: Any) -> Any:
    from retune.tasks.resolve import resolve

    return resolve(name, trigger, **wanted)


def preprocess(run: Any) -> Any:
    from retune.tasks import retrain

    return retrain.preprocess(run)


def plan(run: Any) -> Any:
    from retune.tasks import retrain

    return retrain.plan(run)


def select(run: Any, tuned: Any) -> Any:
    from retune.tasks import retrain

    return retrain.select(run, tuned)


def tune(run: Any, trial: Any) -> Any:
    from retune.tasks import retrain

    return retrain.tune(run, trial)


def evaluate(run: Any, contender: Any) -> Any:
    from retune.tasks import retrain

    return retrain.evaluate(run, contender)


def measure(run: Any, evaluated: Any) -> Any:
    from retune.tasks.measure import measure

    return measure(run, evaluated)


def decide(run: Any, evaluated: Any, measured: Any) -> Any:
    from retune.tasks import verdict

    return verdict.decide(run, evaluated, measured)


def promote(run: Any, evaluated: Any, measured: Any, decided: Any) -> Any:
    from retune.tasks import verdict

    return verdict.promote(run, evaluated, measured, decided)


def whole(name: str, trigger: dict[str, Any], until: str = "promote", shared: str = "", kept: str = "", **wanted: Any) -> Any:
    """A whole run, or as far as it is wanted: [task, arguments, result] of each task. `kept`: a folder that gets, for each task, the folder
    `shared` as the task found it, and for "end" as the last one left it."""
    from retune.tasks import retrain

    done: list[list[Any]] = []

    def step(task: str, function: Any, *arguments: Any, **named: Any) -> Any:
        keep(f"{len(done)}-{task}")
        result = function(*arguments, **named)
        done.append([task, list(arguments), result])
        return result

    def keep(folder: str) -> None:
        if kept:
            shutil.copytree(shared, Path(kept) / folder)

    run = step("resolve", resolve, name, trigger, **wanted)
    run = step("preprocess", preprocess, run)
    tuned = [step("tune", tune, run, trial) for trial in retrain.plan(run)]
    contenders = retrain.select(run, tuned)
    evaluated = [step("evaluate", evaluate, run, contender) for contender in contenders]
    measured = step("measure", measure, run, evaluated)
    decided = step("decide", decide, run, evaluated, measured)
    if until == "promote":
        step("promote", promote, run, evaluated, measured, decided)
    keep(f"{len(done)}-end")
    return done


TASKS = (ingest, stage, lineage, append, resolve, preprocess, plan, tune, select, evaluate, measure, decide, promote, whole)

if __name__ == "__main__":
    order = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for point in order["points"]:
        arm(point)
    chosen = next(task for task in TASKS if task.__name__ == order["task"])
    result = chosen(*order["arguments"], **order["named"])
    Path(order["result"]).write_text(json.dumps(result), "utf-8")
