"""A full disk, on a small file system of its own (tmpfs, which only root may mount) that holds cache, store and temporary files."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.counting import compared, in_store
from faults.places import NAME, Place, folder_place
from faults.scenario import Bench, NotPossible, Outcome, Stopwatch, scenario
from faults.storage import error_of
from faults.workers import Worker

SIZE = 96
"""MB of the disk."""


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        raise NotPossible("only root may mount a small disk")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        raise NotPossible(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    filler = disk / "filler"
    with filler.open("ab") as file:
        status = os.statvfs(disk)
        free = status.f_bavail * status.f_frsize - leave
        if free > 0:
            os.posix_fallocate(file.fileno(), file.tell(), free)
    return filler


def _filled(bench: Bench, stage: str, leave: int) -> Outcome:
    """A stage on a disk with so many bytes left; then, with room again, its retry."""
    place = folder_place(bench)
    reference = place.worker("reference")
    arguments = _before(reference, stage)
    done = reference.run(*arguments)
    expected = in_store(place.opened(), NAME)
    with _small_disk(bench.folder / "disk") as disk:
        here = Place(disk, place.project, str(disk / "store"), place.landing, {"RETUNE_PROMPTS": str(place.folder / "prompts")})
        worker = here.worker("worker", RETUNE_CHECKPOINT_SECONDS="0")
        arguments = _before(worker, stage)
        if stage == "checkpoint":
            return _while_tuning(here, worker, arguments, disk, expected, done)
        filler = _fill(disk, leave)
        watch = Stopwatch()
        failed = worker.start(*arguments).wait()
        filler.unlink()
        again = worker.start(*arguments).wait()
        seconds = watch.seconds
        lost, doubled, words = compared(expected, in_store(here.opened(), NAME))
    told = error_of(failed.output)
    clear = failed.code != 0 and any(words in failed.output for words in ("No space left", "The disk is full"))
    happened = f"with {leave // 1024} kB left it ends with {told[:300]}; with room again the retry does it"
    return Outcome(clear and again.code == 0, seconds, lost, doubled, "; ".join(filter(None, [happened, words])))


def _before(worker: Worker, stage: str) -> tuple[Any, ...]:
    """Does what comes before a stage; the task of the stage, with its arguments."""
    ingest = ("ingest", NAME, "ingest")
    if stage == "ingest":
        return ingest
    worker.run(*ingest)
    lineage, _ = worker.run("stage", "preprocess", NAME, worker.run("lineage"))
    return ("stage", "tune", NAME, lineage)


def _while_tuning(place: Place, worker: Worker, arguments: tuple[Any, ...], disk: Path, expected: Any, undisturbed: Any) -> Outcome:
    running = worker.start(*arguments)
    running.line("checkpoint of step 20 ")
    filler = _fill(disk, 0)
    watch = Stopwatch()
    running.until(
        lambda: running.process.poll() is not None or re.search("was not (saved|stored)", running.output) or watch.seconds > 3,
        "the disk was full",
    )
    time.sleep(1)
    filler.unlink()
    done = running.wait()
    went_on = "tuning went on without it"
    first = error_of(done.output) if done.code else went_on
    if done.code:
        done = worker.start(*arguments).wait()
    lost, doubled, words = compared(expected, in_store(place.opened(), NAME))
    same = done.code == 0 and done.result[0]["lock"] == undisturbed[0]["lock"]
    noted = [line for line in done.output.splitlines() if re.search("was not (saved|stored)", line)][:1]
    if first == went_on and not noted:
        raise RuntimeError("no checkpoint met the full disk")
    return Outcome(
        same,
        watch.seconds,
        lost,
        doubled,
        "; ".join(filter(None, [first[:300], *noted, words, "the same bytes in the end" if same else ""])),
    )


@scenario("disk-full-ingest", "full disk", "ingest", "200 kB left on the disk with cache, store and temporary files")
def full_at_ingest(bench: Bench) -> Outcome:
    return _filled(bench, "ingest", 200 << 10)


@scenario("disk-full-tune", "full disk", "tune", "1 MB left on the disk with cache, store and temporary files")
def full_at_tune(bench: Bench) -> Outcome:
    return _filled(bench, "tune", 1 << 20)


@scenario(
    "disk-full-checkpoint",
    "full disk",
    "checkpoint",
    "the disk fills up while the stage saves its state, and has room again some seconds later",
)
def full_at_checkpoint(bench: Bench) -> Outcome:
    return _filled(bench, "checkpoint", 0)
