"""Workers whose clocks differ. A small library (shifted_clock.c) shifts what every process of a worker sees, stages and DVC included."""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from faults.counting import audited, compared
from faults.kills import undisturbed
from faults.places import NAME, bucket_place, trigger
from faults.scenario import Bench, NotPossible, Outcome, Stopwatch, scenario
from faults.storage import error_of
from retune.ledger import Ledger, standing

HERE = Path(__file__).parent


@contextmanager
def shifted_clock(_bench: Bench, folder: Path) -> Iterator[Path]:
    """The library, built with the C compiler that is there."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotPossible("there is no C compiler to build the shifted clock with")
    library = folder / "shifted_clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shifted_clock.c", "-ldl"], check=True)
    yield library


def _clock(library: Path, seconds: int) -> dict[str, str]:
    return {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(seconds)}


@scenario(
    "clock-skew", "clock skew between workers", "all", "a run whose tasks alternate between a worker 6 hours ahead and one 6 hours behind"
)
def skewed(bench: Bench) -> Outcome:
    library = bench.shared(shifted_clock)
    found = bench.shared(undisturbed)
    found.lay(len(found.steps))
    expected = found.standing()
    found.lay(0)
    ahead, behind = found.worker(bench.folder / "ahead"), found.worker(bench.folder / "behind")
    ahead.own, behind.own = _clock(library, 6 * 3600), _clock(library, -6 * 3600)
    watch = Stopwatch()
    run = behind.run("preprocess", ahead.run("resolve", NAME, trigger("killed")))
    tuned = [ahead.run("tune", run, trial) for trial in behind.run("plan", run)]
    workers = (behind, ahead)
    evaluated = [workers[n % 2].run("evaluate", run, one) for n, one in enumerate(behind.run("select", run, tuned))]
    measured = ahead.run("measure", run, evaluated)
    decided = ahead.run("decide", run, evaluated, measured)
    promoted = behind.run("promote", run, evaluated, measured, decided)
    nothing = ahead.run("resolve", NAME, trigger("later"))
    lost, doubled, words = compared(expected, found.standing())
    entries = Ledger(found.place.opened(), NAME).entries()
    problems = audited(found.place.opened(), found.place.prompt_file)
    champion = standing(entries).champion or {}
    backwards = entries[0].at > entries[1].at
    same = promoted["release"] == champion.get("release") == found.steps[-1][2]["release"]
    return Outcome(
        same and nothing is None and backwards and not problems,
        watch.seconds,
        lost,
        doubled,
        words or f"entry 1 bears {entries[1].at}, entry 0 {entries[0].at}: the order is that of the chain, not of the clocks; same release",
    )


@scenario(
    "clock-skew-s3",
    "clock skew between workers",
    "ledger append",
    "two workers 10 minutes apart append in turn on S3; a third is 20 minutes off, more than S3 takes",
)
def skewed_on_s3(bench: Bench) -> Outcome:
    library = bench.shared(shifted_clock)
    place = bucket_place(bench)
    watch = Stopwatch()
    going = [
        place.worker(name, **_clock(library, shift)).start("append", NAME, name, 5, 0.2)
        for name, shift in (("ahead", 300), ("behind", -300))
    ]
    codes = [task.wait().code for task in going]
    off = place.worker("off", **_clock(library, 1200)).start("append", NAME, "off", 1).wait()
    seconds = watch.seconds
    store = place.opened()
    entries = Ledger(store, NAME).entries()
    lost, doubled, words = compared(
        Counter(f"{name}-{n}" for name in ("ahead", "behind") for n in range(5)), Counter(entry.body["dag_run_id"] for entry in entries)
    )
    wide = abs(datetime.fromisoformat(entries[0].at) - datetime.now(UTC)).total_seconds() > 200
    problems = audited(store, place.prompt_file)
    told = error_of(off.output)
    happened = f"10 entries, each once, in the order of the chain; the worker that is 20 minutes off stops: {told[:300]}"
    return Outcome(
        codes == [0, 0] and wide and not problems and off.code != 0 and "clock" in told,
        seconds,
        lost,
        doubled,
        "; ".join(filter(None, [happened, words, *problems])),
    )
