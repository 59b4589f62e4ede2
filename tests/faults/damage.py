"""Truncated bytes: a checkpoint, an object of a worker's cache, one of the store, an entry of the ledger."""

import subprocess
import sys
from pathlib import Path

from faults.counting import audited, compared
from faults.kills import Undisturbed, undisturbed
from faults.places import NAME, trigger
from faults.scenario import Bench, Outcome, Stopwatch, scenario
from faults.storage import by_itself, error_of, tried
from faults.workers import try_of
from retune.dvc_files import REMOTE


def _cut(path: Path) -> bytes:
    """Leaves the first half of a file; what it held."""
    whole, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(whole[: len(whole) // 2])
    path.chmod(mode)  # DVC trusts an object that is read-only
    return whole


def _store(found: Undisturbed) -> Path:
    return Path(found.place.store)


@scenario("cut-checkpoint", "a truncated checkpoint", "tune", "the worker is killed, and half of the stored checkpoint is left")
def cut_checkpoint(bench: Bench) -> Outcome:
    found = bench.shared(undisturbed)
    number = found.number("tune")
    found.lay(number + 1)
    expected = found.standing()
    found.lay(number)
    task, arguments, undisturbed_result = found.steps[number]
    first, second = found.worker(bench.folder / "first"), found.worker(bench.folder / "second")
    running = first.start(task, *arguments)
    running.line("checkpoint of step 20 ")
    running.kill()
    running.wait()
    (stored,) = (path for path in (_store(found) / "checkpoints").rglob("*") if path.is_file())
    _cut(stored)
    watch = Stopwatch()
    done = second.start(task, *arguments).wait()
    seconds = watch.seconds
    lost, doubled, words = compared(expected, found.standing())
    named = "is damaged" in done.output and "tuning starts anew" in done.output
    return Outcome(
        done.code == 0 and named and done.result["release"] == undisturbed_result["release"] and not first.left(),
        seconds,
        lost,
        doubled,
        words or "the log names it, tuning starts anew, and the release is byte-identical",
    )


@scenario(
    "cut-cache",
    "a truncated cache object",
    "tune, evaluate",
    "half is left of every object in the worker's cache, then both tasks run there",
)
def cut_cache(bench: Bench) -> Outcome:
    found = bench.shared(undisturbed)
    number = found.number("tune")
    found.lay(found.number("measure"))
    expected = found.standing()
    worker = found.worker(bench.folder / "only")
    found.lay(number)
    tasks = [step for step in found.steps[number:] if step[0] in ("tune", "evaluate")]
    for task, arguments, _ in tasks:
        worker.run(task, *arguments)  # fills the cache
    objects = [path for path in (worker.folder / "cache/files").rglob("*") if path.is_file()]
    watch = Stopwatch()
    found.lay(number)
    for path in objects:
        _cut(path)
    errors, failed = [], False
    for task, arguments, _ in tasks:
        done, told = tried(worker, [task, *arguments], lambda: None)
        errors += told
        failed = failed or not by_itself(done, told)
    seconds = watch.seconds
    lost, doubled, words = compared(expected, found.standing())
    return Outcome(
        not failed,
        seconds,
        lost,
        doubled,
        "; ".join(
            filter(None, [f"of all {len(objects)} the inputs were fetched again and the outputs made again", *dict.fromkeys(errors), words])
        ),
    )


@scenario(
    "cut-store-object",
    "a truncated store object",
    "evaluate",
    "half is left of the release's tensors in the store; then they are restored from a backup",
)
def cut_store_object(bench: Bench) -> Outcome:
    found = bench.shared(undisturbed)
    number = found.number("evaluate")
    found.lay(number + 1)
    expected = found.standing()
    found.lay(number)
    task, arguments, _ = found.steps[number]
    tuned = found.steps[found.number("tune")][2]
    md5 = _object(found, tuned["lineage"], "adapter/adapter_model.safetensors")
    place = _store(found) / REMOTE / "files/md5" / md5[:2] / md5[2:]
    whole = _cut(place)
    worker = found.worker(bench.folder / "only")
    watch = Stopwatch()
    refused = worker.start(task, *arguments).wait()
    told = error_of(refused.output)
    place.write_bytes(whole)
    done = worker.start(task, *arguments, more=try_of(2)).wait()
    lost, doubled, words = compared(expected, found.standing())
    named = refused.code != 0 and md5[2:] in refused.output
    return Outcome(
        named and done.code == 0, watch.seconds, lost, doubled, "; ".join(filter(None, [f"evaluate ends with {told[:300]}", words]))
    )


def _object(found: Undisturbed, lineage: dict[str, object], file: str) -> str:
    from retune.objects import Objects
    from retune.records import Lineage

    objects = Objects(found.place.opened(), Path("/nonexistent"))
    return objects.files(Lineage.from_json(lineage), f"artifacts/{NAME}/release")[file]


@scenario(
    "cut-entry",
    "a truncated ledger entry",
    "resolve",
    "half is left of the ledger's last entry, then of one before it; then each is restored from a backup",
)
def cut_entry(bench: Bench) -> Outcome:
    found = bench.shared(undisturbed)
    worker = found.worker(bench.folder / "only")
    watch = Stopwatch()
    good, told, lost, doubled = True, [], 0, 0
    for n in (1, 0):
        found.lay(len(found.steps))
        expected = found.standing()
        place = _store(found) / f"ledger/{NAME}/{n:08d}.json"
        whole = _cut(place)
        problems = audited(found.place.opened(), found.place.prompt_file)
        command = subprocess.run(
            [sys.executable, "-m", "retune.cli", "audit", NAME],
            env=worker.environment,
            cwd=found.place.project,
            capture_output=True,
            text=True,
        )
        stopped = worker.start("resolve", NAME, trigger(f"cut {n}")).wait()
        error = error_of(stopped.output)
        named = [f"entry {n} " in problems[0] if problems else False, f"entry {n} " in command.stdout, f"entry {n} " in error]
        good = good and command.returncode == 1 and stopped.code != 0 and all(named) and "restore it from a backup" in error
        told.append(error)
        place.write_bytes(whole)
        # The same inputs were decided on: a run that may go on finds nothing to do.
        good = good and worker.run("resolve", NAME, trigger(f"restored {n}")) is None
        missing, extra, _ = compared(expected, found.standing())
        lost, doubled = lost + missing, doubled + extra
    return Outcome(
        good,
        watch.seconds,
        lost,
        doubled,
        f"`retune audit` names it and exits with 1; a run stops at its first task: {told[0]}; restored, it goes on",
    )
