"""S3 that answers 503, slowly, resets, or gives half an object, between the workers and a real S3 server.

A task that fails is tried again twice, as Airflow does, unless its error says that a retry cannot help; the fault lasts meanwhile. Where no
try succeeds it was not recovered from: the fault is lifted then and the task started once more, to count what that leaves. What the bucket
holds in the end is compared with one that nothing disturbed.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_proxy import Fault

from faults.counting import audited, compared, in_store
from faults.places import NAME, Place, bucket_place, checkout, s3_and_proxy
from faults.scenario import Bench, Outcome, Stopwatch, scenario
from faults.workers import Done, Worker, try_of
from retune.ledger import Ledger
from retune.store import Store, open_store

TRIES = 3
"""As many as Airflow gives a task."""
FINAL = ("BadInputError", "ConfigError", "IntegrityError")
"""Errors that Airflow does not retry."""
ENTRIES = 5


@dataclass(frozen=True)
class Reference:
    """A bucket that nothing disturbed: its objects and what they amount to before and after each task."""

    prompt: bytes
    """The prompt file, whose bytes a lineage holds."""
    objects: Mapping[str, bytes]
    keys: Mapping[str, list[str]]
    """Task -> keys of the bucket that it found."""
    arguments: Mapping[str, list[Any]]
    after: Mapping[str, "Counter[str]"]


@contextmanager
def undisturbed_bucket(bench: Bench, folder: Path) -> Iterator[Reference]:
    place = bucket_place(bench, folder)
    worker, bucket = place.worker("undisturbed"), _bucket(bench, place)
    keys, arguments, after = {}, {}, {}

    def step(name: str, task: str, *given: Any) -> Any:
        keys[name], arguments[name] = bucket.list(), [task, *given]
        result = worker.run(task, *given)
        after[name] = in_store(place.opened(), NAME)
        return result

    step("ingest", "ingest", NAME, "ingest")
    lineage, _ = step("preprocess", "stage", "preprocess", NAME, worker.run("lineage"))
    step("tune", "stage", "tune", NAME, lineage)
    keys["append"], arguments["append"] = keys["ingest"], ["append", NAME, "one", ENTRIES]
    yield Reference(place.prompt_file.read_bytes(), {key: bucket.get(key) for key in bucket.list()}, keys, arguments, after)


def _bucket(bench: Bench, place: Place) -> Store:
    return open_store("/".join(place.store.split("/")[:3]), bench.shared(s3_and_proxy)[0].endpoint)


def tried(worker: Worker, arguments: list[Any], lift: Any, tries: int = TRIES) -> tuple[list[Done], list[str]]:
    """Every try of a task up to the first that succeeds, and the errors of the others. Before a try that Airflow would not make, `lift`
    ends the fault."""
    done: list[Done] = []
    errors: list[str] = []
    task, *rest = arguments
    for number in range(tries + 1):
        if number == tries or (errors and errors[-1].split(":")[0] in FINAL):
            lift()
        done.append(worker.start(task, *rest, more={"RETUNE_CHECKPOINT_SECONDS": "0", **try_of(number + 1)}).wait())
        if done[-1].code == 0:
            break
        errors.append(error_of(done[-1].output))
    return done, errors


def by_itself(done: list[Done], errors: list[str]) -> bool:
    """Whether the tries that Airflow makes did it."""
    return done[-1].code == 0 and len(done) <= TRIES and not any(error.split(":")[0] in FINAL for error in errors)


def error_of(output: str) -> str:
    """Kind and text of the error that ended a task; of one that repeats the last lines of a stage, its own last line too."""
    found = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.*)", output, re.MULTILINE)
    if not found:
        return output[-200:]
    kind, text = found[-1]
    own = re.findall(r"^(?:ERROR: |The disk is full).*", output, re.MULTILINE) if text.endswith("Its last lines:") else []
    return f"{kind}: {text}{f' {own[-1]}' if own else ''}"


def in_words(tries: int, errors: list[str]) -> str:
    if not errors:
        return "done at the first try"
    told = "; ".join(dict.fromkeys(error[:240] for error in errors))
    return f"done at try {tries}, after {told}"


def _disturbed(bench: Bench, stage: str, *faults: Fault) -> Outcome:
    reference: Reference = bench.shared(undisturbed_bucket)
    proxy = bench.shared(s3_and_proxy)[1]
    place = bucket_place(bench)
    bucket = _bucket(bench, place)
    for key in reference.keys[stage]:
        bucket.put(key, reference.objects[key])
    if stage != "ingest":
        place.prompt_file.write_bytes(reference.prompt)
    watch = Stopwatch()
    with proxy.doing(*faults):
        done, errors = tried(place.worker("one"), reference.arguments[stage], proxy.lift)
        seconds = watch.seconds
    met = [fault.met for fault in faults]
    store = place.opened()
    if stage == "append":
        entries = Counter(entry.body["dag_run_id"] for entry in Ledger(store, NAME).entries())
        lost, doubled, words = compared(Counter(f"one-{number}" for number in range(ENTRIES)), entries)
        problems = audited(store, place.prompt_file)
    else:
        lost, doubled, words = compared(reference.after[stage], in_store(store, NAME))
        problems = []
    if not all(met):
        raise RuntimeError(f"of {faults}, {met} requests met each")
    happened = f"{sum(met)} requests met it; {in_words(len(done), errors)}"
    return Outcome(by_itself(done, errors) and not problems, seconds, lost, doubled, "; ".join(filter(None, [happened, words, *problems])))


WHERE = {
    "ingest": ("GET", "/landing/", "PUT", "/dvc/"),
    "preprocess": ("GET", "/dvc/", "PUT", "/dvc/"),
    "append": ("GET", "/ledger/", "PUT", "/ledger/"),
    "tune": ("GET", "/checkpoints/|/dvc/", "PUT", "/checkpoints/|/dvc/"),
}
"""Task -> requests that fetch its input, and those that keep its result."""
SHOWN = {"ingest": "ingest", "preprocess": "dvc pull and push", "append": "ledger append", "tune": "checkpoint"}
FAULTS: dict[str, tuple[str, str]] = {
    "503": ("S3 answers 503", "the first 7 fetches and 7 uploads are answered with 503"),
    "slow": ("S3 answers slowly", "the first 10 requests are answered after 2 s"),
    "reset": ("S3 resets mid-upload", "the first fetch and 6 uploads are reset half-way"),
    "lost-answer": ("S3 resets mid-upload", "the first 2 uploads are done and their answers lost"),
    "cut": ("S3 returns a truncated object", "the first 2 fetches end after half of the announced length"),
    "short": ("S3 returns a truncated object", "the first fetch gives half of the object under a length that fits it"),
}
FAST = {("503", "ingest"), ("cut", "preprocess"), ("short", "append"), ("lost-answer", "append")}


def faults_of(kind: str, stage: str) -> list[Fault]:
    get, fetched, put, kept = WHERE[stage]
    match kind:
        case "503":
            return [Fault("503", get, fetched, 7), Fault("503", put, kept, 7)]
        case "slow":
            return [Fault("slow", ".*", "/", 10, seconds=2.0)]
        case "reset":
            return [Fault("reset", get, fetched, 1), Fault("reset", put, kept, 6)]
        case "lost-answer":
            return [Fault("lost answer", put, kept, 2)]
        case "cut":
            return [Fault("cut", get, fetched, 2)]
        case _:
            return [Fault("short", get, fetched, 1)]


def _enter(kind: str, stage: str) -> None:
    fault, did = FAULTS[kind]

    @scenario(f"s3-{kind}-{stage}", fault, SHOWN[stage], did, fast=(kind, stage) in FAST)
    def disturbed(bench: Bench) -> Outcome:
        bench.shared(checkout)
        return _disturbed(bench, stage, *faults_of(kind, stage))


for _stage in WHERE:
    for _kind in FAULTS:
        _enter(_kind, _stage)
