"""Several at once: promotions by eight processes, two real promotions, one DAG run twice."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from s3_server import S3

from faults.counting import audited, compared, in_mlflow, in_store
from faults.places import NAME, checkout, folder_place, s3_and_proxy, trigger
from faults.scenario import Bench, Outcome, Stopwatch, scenario
from faults.workers import wait_at
from retune.ledger import Entry, Ledger, standing
from retune.store import Store, open_store

RACERS, ROUNDS = 8, 50


def _race(bench: Bench, store: Store, **environment: str) -> Outcome:
    """Eight processes, 50 rounds: a win is lost if its entry is not in the ledger, doubled if a round has several."""
    project = bench.shared(checkout)
    start = bench.folder / "start"
    start.mkdir()
    watch = Stopwatch()
    environ = {**os.environ, **environment, "PYTHONPATH": str(project / "src")}
    program = str(Path(__file__).parent / "racer.py")
    racers = [
        subprocess.Popen(
            [sys.executable, program, store.url, NAME, str(ROUNDS), f"p{i}", str(start)], stdout=subprocess.PIPE, text=True, env=environ
        )
        for i in range(RACERS)
    ]
    while len(list(start.iterdir())) < RACERS:
        time.sleep(0.01)
        if watch.seconds > 120 or any(racer.poll() for racer in racers):
            raise RuntimeError("the racers did not start")
    watch.start()
    (start / "go").touch()
    said = [racer.communicate(timeout=600)[0].split() for racer in racers]
    seconds = watch.seconds
    if any(racer.returncode for racer in racers) or any(len(each) != ROUNDS for each in said):
        raise RuntimeError(f"racers ended with {[racer.returncode for racer in racers]}")
    winners = [[f"p{i}" for i in range(RACERS) if said[i][n] == "won"] for n in range(ROUNDS)]
    entries = Ledger(store, NAME).entries()
    told = Counter((n, name) for n, names in enumerate(winners) for name in names)
    kept = Counter((entry.n, entry.by) for entry in entries)
    problems = audited(store, project / f"prompts/{NAME}.yaml")
    met = sum(each.count("lost") for each in said)
    return Outcome(
        recovered=not problems and len(entries) == ROUNDS and met > 0,
        seconds=seconds,
        lost=(told - kept).total() + ROUNDS - len({n for n, _ in told}),
        doubled=(kept - told).total() + sum(len(names) - 1 for names in winners if names),
        happened=f"{sum(len(names) == 1 for names in winners)} of {ROUNDS} rounds had exactly one winner, {met} attempts lost; "
        + (f"the audit finds: {'; '.join(problems)}" if problems else "`retune audit` finds the chain valid"),
    )


@scenario("race-folder", "two promotions at once", "promote", "8 processes promote at once on the folder store, 50 rounds", fast=True)
def race_on_a_folder(bench: Bench) -> Outcome:
    return _race(bench, open_store(bench.folder / "store"))


@scenario("race-s3", "two promotions at once", "promote", "8 processes promote at once on S3, 50 rounds", fast=True)
def race_on_s3(bench: Bench) -> Outcome:
    bench.shared(checkout)
    s3: S3 = bench.shared(s3_and_proxy)[0]
    bucket = s3.make_bucket("race")
    return _race(bench, open_store(f"s3://{bucket}/store", s3.endpoint), **s3.env)


@scenario(
    "promotions-at-once",
    "two promotions at once",
    "promote",
    "two runs, both decided PROMOTE against the same champion, come to the ledger at the same time, on two workers",
)
def promotions_at_once(bench: Bench) -> Outcome:
    place = folder_place(bench)
    one, two = place.worker("one"), place.worker("two")
    one.run("ingest", NAME, "ingest")
    runs = {
        "first": one.run("whole", NAME, trigger("first"), until="decide"),
        "second": one.run("whole", NAME, trigger("second"), until="decide", overrides={"tune.seed": 14}),
    }
    done = {name: {task: (arguments, result) for task, arguments, result in steps} for name, steps in runs.items()}
    verdicts = {name: tasks["decide"][1]["verdict"] for name, tasks in done.items()}
    if set(verdicts.values()) != {"PROMOTE"}:
        raise RuntimeError(f"both were to be promoted, got {verdicts}")
    watch = Stopwatch()
    going = {}
    for worker, (name, tasks) in zip((one, two), done.items(), strict=True):
        arguments = [*tasks["decide"][0], tasks["decide"][1]]
        gate = bench.folder / name
        going[name] = worker.start("promote", *arguments, points=[wait_at("retune.ledger:Ledger.append", gate)]), gate
    for task, gate in going.values():
        task.until(lambda gate=gate: Path(f"{gate}.reached").exists(), "it came to the ledger")
    watch.start()
    for _, gate in going.values():
        Path(f"{gate}.go").touch()
    ended = {name: task.wait() for name, (task, _) in going.items()}
    seconds = watch.seconds
    store = place.opened()
    entries = Ledger(store, NAME).entries()
    decided = Counter(entry.body["dag_run_id"] for entry in entries if "decision" in entry.body)
    wanted = Counter(["first", "second"])
    redecided = [name for name, each in ended.items() if "deciding again" in each.output]
    promoted = [entry.body["dag_run_id"] for entry in entries if entry.kind == "promote"]
    problems = audited(store, place.prompt_file)
    champion = standing(entries).champion or {}
    alias = f"alias champion {champion.get('release')}"
    in_order = all(each.code == 0 for each in ended.values()) and in_mlflow(place.tracking_uri, NAME)[alias] == 1
    return Outcome(
        recovered=in_order and not problems and len(redecided) == 1 and promoted[:1] == [name for name in ended if name not in redecided],
        seconds=seconds,
        lost=(wanted - decided).total(),
        doubled=(decided - wanted).total() + len(promoted) - len(set(promoted)),
        happened=f"{promoted[0]} won; {', '.join(redecided)} decided again against the new champion: {_last(entries, redecided)}",
    )


def _last(entries: list[Entry], names: list[str]) -> str:
    return ", ".join(
        entry.body["decision"]["verdict"] for entry in entries if "decision" in entry.body and entry.body["dag_run_id"] in names
    )


@scenario(
    "run-twice",
    "the same DAG run triggered twice",
    "all",
    "every task of a run done again under the same run id on another worker; then `promote` twice at the same time",
)
def run_twice(bench: Bench) -> Outcome:
    place = folder_place(bench)
    one, two = place.worker("one"), place.worker("two")
    one.run("ingest", NAME, "ingest")
    steps: dict[str, Any] = {task: (a, r) for task, a, r in one.run("whole", NAME, trigger("once"), until="decide")}
    gates = [bench.folder / "a", bench.folder / "b"]
    arguments = [*steps["decide"][0], steps["decide"][1]]
    watch = Stopwatch()
    both = [
        w.start("promote", *arguments, points=[wait_at("retune.ledger:Ledger.append", g)]) for w, g in zip((one, two), gates, strict=True)
    ]
    for task, gate in zip(both, gates, strict=True):
        task.until(lambda gate=gate: Path(f"{gate}.reached").exists(), "it came to the ledger")
    for gate in gates:
        Path(f"{gate}.go").touch()
    codes = [task.wait().code for task in both]
    store = place.opened()
    before = in_store(store, NAME) + in_mlflow(place.tracking_uri, NAME)
    versions = sum(count for name, count in before.items() if name.startswith("version "))
    entries = Ledger(store, NAME).entries()
    two.run("ingest", NAME, "ingest")
    again = two.run("whole", NAME, trigger("once"), force=True)
    seconds = watch.seconds
    lost, doubled, words = compared(before, in_store(store, NAME) + in_mlflow(place.tracking_uri, NAME))
    return Outcome(
        recovered=codes == [0, 0] and [e.kind for e in entries] == ["found", "promote"] and again[-1][2]["entry"] == 1,
        seconds=seconds,
        lost=lost,
        doubled=doubled + max(0, versions - 2),
        happened=words
        or "one entry, one version, one MLflow run; the second time every stage was restored and the recorded verdict returned",
    )
