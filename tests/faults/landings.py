"""A landing object that is replaced while it is read."""

from collections import Counter
from pathlib import Path

from fault_proxy import Fault

from faults.counting import compared, rows
from faults.places import BATCH, NAME, bucket_place, folder_place, s3_and_proxy
from faults.scenario import Bench, Outcome, Stopwatch, scenario
from faults.storage import error_of
from faults.workers import wait_at
from retune.ledger import Ledger
from retune.store import Store, open_store

FIRST, SECOND = sorted(BATCH.iterdir())


def _expected(bench: Bench) -> "Counter[str]":
    """The rows where the object was the second file from the start."""
    (bench.folder / "expected").mkdir()
    place = folder_place(bench, bench.folder / "expected")
    landing = Path(place.landing)
    for file in landing.iterdir():
        file.unlink()
    (landing / FIRST.name).write_bytes(SECOND.read_bytes())
    place.worker("reader").run("ingest", NAME, "ingest")
    return rows(place.opened(), NAME)


def _result(bench: Bench, store: Store, watch: Stopwatch, told: str, done: bool) -> Outcome:
    lost, doubled, words = compared(_expected(bench), rows(store, NAME))
    (last,) = Ledger(store, "dataset").entries()[-1:]
    (landed,) = last.body["objects"][NAME].values()
    accounted = landed["rows"] == landed["kept"] + landed["duplicates"] + sum(landed["quarantined"].values())
    return Outcome(done and accounted, watch.seconds, lost, doubled, "; ".join(filter(None, [told, words])))


@scenario(
    "landing-replaced-folder",
    "a landing object replaced while it is read",
    "ingest",
    "the file is replaced between its first and its last row; then the retry",
    fast=True,
)
def replaced_in_a_folder(bench: Bench) -> Outcome:
    place = folder_place(bench)
    landing = Path(place.landing)
    (landing / SECOND.name).unlink()
    worker, gate = place.worker("reader"), bench.folder / "gate"
    reading = worker.start("ingest", NAME, "ingest", points=[wait_at("retune.data.ingest:_take", gate)])
    reading.until(Path(f"{gate}.reached").exists, "it read")
    (landing / "new").write_bytes(SECOND.read_bytes())
    (landing / "new").replace(landing / FIRST.name)
    watch = Stopwatch()
    Path(f"{gate}.go").touch()
    refused = reading.wait()
    again = worker.start("ingest", NAME, "ingest").wait()
    told = f"ingest ends with {error_of(refused.output)}; the retry holds the new file's rows and none of the old"
    named = refused.code != 0 and "was replaced while it was read" in refused.output
    return _result(bench, place.opened(), watch, told, named and again.code == 0)


@scenario(
    "landing-replaced-s3",
    "a landing object replaced while it is read",
    "ingest",
    "on S3, replaced after the listing and before its download; then once more during the download",
)
def replaced_on_s3(bench: Bench) -> Outcome:
    place = bucket_place(bench)
    s3, proxy = bench.shared(s3_and_proxy)
    landing = open_store(place.landing, s3.endpoint)
    _only(place.landing, s3.endpoint, {FIRST.name: FIRST.read_bytes() + FIRST.read_bytes()})
    worker = place.worker("reader")
    slow = Fault("slow", "GET", f"/landing/{FIRST.name}", 1, seconds=3.0)
    proxy.do(slow)
    reading = worker.start("ingest", NAME, "ingest")
    reading.until(lambda: slow.met, "it asked for the object")
    landing.put(FIRST.name, FIRST.read_bytes())
    watch = Stopwatch()
    refused = reading.wait()
    proxy.lift()
    # The answer is on its way when the object is replaced: what is read is the old one, whole, and the next ingest finds a new one.
    gate = bench.folder / "gate"
    reading = worker.start("ingest", NAME, "again", points=[wait_at("retune.data.ingest:_take", gate)])
    reading.until(Path(f"{gate}.reached").exists, "it read")
    landing.put(FIRST.name, SECOND.read_bytes())
    Path(f"{gate}.go").touch()
    whole = reading.wait()
    again = worker.start("ingest", NAME, "third").wait()
    told = f"ingest ends with {error_of(refused.output)}; the retry reads one whole, and the next ingest takes the newer in its place"
    named = refused.code != 0 and "was replaced while it was read" in refused.output
    return _result(bench, place.opened(), watch, told, named and whole.code == 0 and again.code == 0)


def _only(url: str, endpoint: str, objects: dict[str, bytes]) -> None:
    """Makes these the objects of a landing zone."""
    from urllib.parse import urlsplit

    from retune.store import s3_client

    client, parts = s3_client(endpoint), urlsplit(url)
    landing = open_store(url, endpoint)
    for key in landing.list():
        client.delete_object(Bucket=parts.netloc, Key=f"{parts.path.strip('/')}/{key}")
    for key, content in objects.items():
        landing.put(key, content)
