"""`kill -9` of the worker in every stage; the task's retry runs on another worker with a home and a cache of its own.

One undisturbed run is the measure: what store, ledger and MLflow held before and after each of its tasks is kept. A kill starts from what
the task found, and what is there after the retry is compared with what the undisturbed task left: every object, so every byte of the
release, every entry, version, run and point of a curve.
"""

import contextlib
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from faults.counting import audited, compared, in_mlflow, in_store
from faults.places import NAME, Place, folder_place, trigger
from faults.scenario import Bench, Outcome, Stopwatch, scenario
from faults.workers import Task, Worker, kill_at, try_of

STAGE_RUNS = "retune.child:run_guarded"
"""Where a task starts a process of its own: DVC with the stage in it, or the measurement."""


@dataclass(frozen=True)
class Undisturbed:
    place: Place
    kept: Path
    steps: list[list[Any]]
    """[task, arguments, result] of each task, in order."""

    def number(self, task: str) -> int:
        return next(n for n, step in enumerate(self.steps) if step[0] == task)

    def lay(self, number: int) -> None:
        """What the task of that number found; for the number after the last, what that one left."""
        name = self.steps[number][0] if number < len(self.steps) else "end"
        shutil.rmtree(self.place.folder / "shared")
        shutil.copytree(self.kept / f"{number}-{name}", self.place.folder / "shared")

    def standing(self) -> "Counter[str]":
        return in_store(self.place.opened(), NAME) + in_mlflow(self.place.tracking_uri, NAME)

    def worker(self, folder: Path) -> Worker:
        shutil.rmtree(folder, ignore_errors=True)
        return replace(self.place.worker("x"), folder=folder, own={"RETUNE_CHECKPOINT_SECONDS": "0"})


@contextmanager
def undisturbed(bench: Bench, folder: Path) -> Iterator[Undisturbed]:
    """A run to its promotion that nothing disturbs, and what each of its tasks found."""
    place = folder_place(bench, folder)
    worker = place.worker("undisturbed")
    worker.run("ingest", NAME, "ingest")
    steps = worker.run("whole", NAME, trigger("killed"), shared=str(folder / "shared"), kept=str(folder / "kept"))
    if steps[-1][2]["verdict"] != "PROMOTE":
        raise RuntimeError(f"the undisturbed run was to be promoted, got {steps[-1][2]}")
    yield Undisturbed(place, folder / "kept", steps)


def _killed(bench: Bench, task: str, kills: Mapping[str, Sequence[Mapping[str, Any]] | str], at_random: int = 0) -> Outcome:
    """Kills a task as each of `kills` says (by points, or `line: TEXT`, `stage: MODULE`), and `at_random` times more at a random moment."""
    found = bench.shared(undisturbed)
    number = found.number(task)
    name, arguments, _ = found.steps[number]
    found.lay(number + 1)
    expected = found.standing()
    lost = doubled = 0
    longest, words, recovered = 0.0, [], True
    moments = {f"after {(seconds := bench.random.uniform(0.5, 6)):.1f} s": seconds for _ in range(at_random)}
    for where, how in {**kills, **moments}.items():
        found.lay(number)
        first, second = found.worker(bench.folder / "first"), found.worker(bench.folder / "second")
        _kill(first, name, arguments, how)
        watch = Stopwatch()
        again = second.start(name, *arguments, more=try_of(2)).wait()
        longest = max(longest, watch.seconds)
        missing, extra, differences = compared(expected, found.standing())
        left = first.left() + second.left()
        bad = audited(found.place.opened(), found.place.prompt_file)
        lost, doubled = lost + missing, doubled + extra
        recovered = recovered and again.code == 0 and not left and not bad
        problems = [differences, *bad, *left, "" if again.code == 0 else again.output[-500:]]
        words += [f"{where}: {'; '.join(filter(None, problems))}"] if any(problems) else []
    good = f"killed {len(kills) + len(moments)} times ({', '.join([*kills, *moments])}); each retry left what an undisturbed task leaves"
    return Outcome(recovered, longest, lost, doubled, "; ".join(words) or good)


def _kill(worker: Worker, task: str, arguments: Sequence[Any], how: Any) -> None:
    if isinstance(how, float):
        running = worker.start(task, *arguments)
        _after(running, how)
    elif isinstance(how, str):
        kind, _, what = how.partition(": ")
        running = worker.start(task, *arguments)
        if kind == "line":
            running.line(what)
            running.kill()
            running.wait()
        else:
            running.kill_stage(what)
            if running.wait().code == 0:
                raise RuntimeError("the task outlived its stage's end by SIGKILL")
    else:
        worker.killed(task, *arguments, points=how)


def _after(running: Task, seconds: float) -> None:
    """A task that is done by then is as good: its retry must double nothing."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.process.wait(seconds)
    running.kill()
    running.wait()


KILL = "kill -9 of the worker"


@scenario(
    "kill-resolve", KILL, "resolve", "killed with MLflow's run open, in stage preprocess, after registering, before and after entry 0"
)
def kill_resolve(bench: Bench) -> Outcome:
    return _killed(
        bench,
        "resolve",
        {
            "MLflow run open": [kill_at("retune.tracking:Tracker.open", "after")],
            "stage preprocess running": "line: > python -m retune.stages.preprocess",
            "template registered": [kill_at("retune.registry:Registry.register", "after")],
            "before entry 0": [kill_at("retune.ledger:Ledger.append")],
            "after entry 0": [kill_at("retune.ledger:Ledger.append", "after")],
        },
        at_random=1,
    )


@scenario("kill-preprocess", KILL, "preprocess", "killed after the restore of the stage, with half of it logged")
def kill_preprocess(bench: Bench) -> Outcome:
    points = {"dataset logged": [kill_at("retune.tracking:Tracker.dataset", "after")]}
    return _killed(bench, "preprocess", points, at_random=1)


@scenario("kill-tune", KILL, "tune", "killed after a checkpoint; before what was pushed is indexed; with the curve half logged", fast=True)
def kill_tune(bench: Bench) -> Outcome:
    return _killed(
        bench,
        "tune",
        {
            "checkpoint of step 20": "line: checkpoint of step 20 ",
            "pushed, not indexed": [kill_at("retune.objects:Objects.verify", call=3)],
            "indexed, not logged": [kill_at("retune.tracking:Tracker.curve")],
        },
    )


@scenario("kill-tune-stage", "kill -9 of the stage", "tune", "the stage's own process killed, as for want of memory, and at random moments")
def kill_tune_stage(bench: Bench) -> Outcome:
    return _killed(bench, "tune", {"the stage's process": "stage: retune.stages.tune"}, at_random=3)


@scenario("kill-evaluate", KILL, "evaluate", "killed while the stage runs, and before what was pushed is indexed")
def kill_evaluate(bench: Bench) -> Outcome:
    return _killed(
        bench,
        "evaluate",
        {
            "stage running": "line: > python -m retune.stages.evaluate",
            "the stage's process": "stage: retune.stages.evaluate",
            "pushed, not indexed": [kill_at("retune.objects:Objects.verify", call=2)],
        },
        at_random=1,
    )


@scenario("kill-measure", KILL, "measure", "killed while the measurement runs")
def kill_measure(bench: Bench) -> Outcome:
    points = {"measuring": [kill_at(STAGE_RUNS, seconds=2.0)], "the measurement's process": "stage: retune.stages.measure"}
    return _killed(bench, "measure", points, at_random=1)


@scenario("kill-decide", KILL, "decide", "killed with the verdict half shown in MLflow")
def kill_decide(bench: Bench) -> Outcome:
    return _killed(bench, "decide", {"figures logged": [kill_at("retune.tracking:Tracker.metrics", "after")]}, at_random=1)


@scenario(
    "kill-register", KILL, "register", "killed with the model logged and no version made; with a version that the ledger does not know"
)
def kill_register(bench: Bench) -> Outcome:
    return _killed(
        bench,
        "promote",
        {
            "model logged": [kill_at("retune.registry:Registry._log", "after")],
            "version made": [kill_at("retune.registry:Registry.register", "after")],
            "card half written": [kill_at("mlflow:MlflowClient.log_model_artifact")],
        },
    )


@scenario("kill-promote", KILL, "promote", "killed right after the ledger's entry, and between the aliases")
def kill_promote(bench: Bench) -> Outcome:
    return _killed(
        bench,
        "promote",
        {
            "after the entry": [kill_at("retune.ledger:Ledger.append", "after")],
            "between the aliases": [kill_at("mlflow:MlflowClient.set_registered_model_alias", "after")],
        },
    )


@scenario("kill-promote-ends", KILL, "promote", "killed right before the ledger's entry, and before the new champion's first prediction")
def kill_promote_ends(bench: Bench) -> Outcome:
    return _killed(
        bench,
        "promote",
        {
            "before the entry": [kill_at("retune.ledger:Ledger.append")],
            "before its first prediction": [kill_at("retune.registry:Registry.predict")],
        },
    )


@scenario(
    "kill-everywhere", KILL, "all", "a whole run in which every task is killed once at a random moment, and tried again on the other worker"
)
def kill_everywhere(bench: Bench) -> Outcome:
    found = bench.shared(undisturbed)
    found.lay(len(found.steps))
    expected = found.standing()
    found.lay(0)
    workers = found.worker(bench.folder / "first"), found.worker(bench.folder / "second")
    longest, died = 0.0, []
    tried = 0

    def twice(task: str, *arguments: Any) -> Any:
        nonlocal longest, tried
        first, second = workers[tried % 2], workers[1 - tried % 2]
        running = first.start(task, *arguments)
        _after(running, bench.random.uniform(1.0, 6.0))
        died.append(running.process.returncode != 0)
        watch = Stopwatch()
        result = second.run(task, *arguments, more=try_of(2))
        longest, tried = max(longest, watch.seconds), tried + 1
        return result

    run = twice("preprocess", twice("resolve", NAME, trigger("killed")))
    tuned = [twice("tune", run, trial) for trial in twice("plan", run)]
    evaluated = [twice("evaluate", run, contender) for contender in twice("select", run, tuned)]
    measured = twice("measure", run, evaluated)
    promoted = twice("promote", run, evaluated, measured, twice("decide", run, evaluated, measured))
    lost, doubled, words = compared(expected, found.standing())
    problems = audited(found.place.opened(), found.place.prompt_file)
    if not any(died):
        raise RuntimeError("every task was done before it was to die")
    return Outcome(
        promoted["release"] == found.steps[-1][2]["release"] and not problems,
        longest,
        lost,
        doubled,
        words
        or f"{sum(died)} of {len(died)} tasks died of it, the others were done before; the release is byte-identical, nothing else differs",
    )
