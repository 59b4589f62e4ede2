"""`make demo`: two batches of the example land, are taken in, tuned on and judged, on a stack of this machine.

    python -m retune.local.demo      (KEEP=1 leaves the stack running)

What it shows is read back from the ledgers, never from what it did itself; so a second call shows the same, and a demo that was
interrupted goes on where it stopped.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retune.cli_output import console as terminal
from retune.config import load_prompt
from retune.errors import RetuneError
from retune.evaluation.roles import CANDIDATE, CHAMPION, FEW_SHOT, ROLE_TITLES
from retune.ledger import Entry, Ledger
from retune.local import running, start, stop
from retune.local.files import write_private
from retune.local.landing import land
from retune.local.progress import follow
from retune.local.rounds import VERDICTS, connect, explain_failure, explain_nothing, ingest, retrain_after
from retune.settings import Settings, without_password
from retune.store import Store, open_store
from retune.tasks.ingest import ingest as take_in

__all__ = ["batch_revision", "main", "round_report", "verdict_on"]

PROMPT = "ticket_priority"
BATCHES = ("1", "2")
SECOND_PROMPT, SECOND_BATCH = "ticket_summary", "1"
"""Data that are taken in, and tuned on when a person asks for it."""
COLOURS = {"PROMOTE": "green", "HOLD": "yellow", "REJECT": "red"}


def batch_revision(dataset: list[Entry], prompt: str, names: set[str]) -> Entry | None:
    """The first revision that holds every file of a batch."""
    for entry in dataset:
        keys = {Path(key).name for key in entry.body["objects"].get(prompt, {})}
        if names <= keys:
            return entry
    return None


def verdict_on(entries: list[Entry], revision: int) -> Entry | None:
    """The first decision that was made on a revision."""
    return next((e for e in entries if e.kind in VERDICTS and e.body.get("dataset_revision") == revision), None)


def round_report(batch: str, revision: Entry, decided: Entry, prompt: str, seconds: dict[str, float]) -> dict[str, Any]:
    """What `demo.json` and the summary say of a round: the ledgers' figures, and the seconds of its tasks."""
    body = decided.body
    decision = body["decision"]
    return {
        "batch": batch,
        "dataset_revision": revision.n,
        "rows": revision.body["rows"][prompt],
        "dag_run_id": body["dag_run_id"],
        "mlflow_run_id": body["mlflow_run_id"],
        "verdict": decision["verdict"],
        "reasons": decision["reasons"],
        "metrics": {
            "baseline": body["baseline"]["metrics"],
            **({FEW_SHOT: body[FEW_SHOT]["metrics"]} if FEW_SHOT in body else {}),
            "champion": body["champion_before"]["metrics"],
            "candidate": body["candidate"]["metrics"],
        },
        "release": body["candidate"]["release"],
        "version": body["candidate"]["version"],
        "ledger_entry": decided.n,
        "comparison": decision["comparison"],
        "seconds": seconds,
    }


@dataclass
class _Demo:
    settings: Settings
    store: Store
    console: Console
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """Batch -> step -> seconds, of earlier calls too."""

    def files(self, batch: str, prompt: str = PROMPT) -> list[Path]:
        folder = self.settings.project / "examples" / "batches" / prompt / batch
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))

    def revision(self, batch: str) -> Entry | None:
        return batch_revision(Ledger(self.store, "dataset").entries(), PROMPT, {f.name for f in self.files(batch)})

    def decided(self, batch: str) -> tuple[Entry, Entry] | None:
        """Revision and decision of a batch that is through."""
        revision = self.revision(batch)
        decided = verdict_on(Ledger(self.store, PROMPT).entries(), revision.n) if revision else None
        return (revision, decided) if revision and decided else None

    def take_in_second(self) -> None:
        """Lands the second prompt's batch and ingests it without the DAG: that updates no Asset, so nothing is tuned beside the demo."""
        land(self.settings, load_prompt(self.settings.prompts / f"{SECOND_PROMPT}.yaml"), self.files(SECOND_BATCH, SECOND_PROMPT))
        if taken := take_in(SECOND_PROMPT, "demo", "retune.local.demo", lambda _: None):
            self.console.print(f"  dataset revision {taken['revision']}: {taken['rows']} rows of {SECOND_PROMPT}, for later")

    def play(self, batch: str) -> None:
        """Lands a batch and follows it to its verdict, leaving out what is done already."""
        stack = running(self.settings)
        if stack is None:
            raise RetuneError("the stack stopped in the middle of the demo; see `retune doctor`, then run it again to go on")
        airflow, took = connect(stack), self.seconds.setdefault(batch, {})
        begun = datetime.now(UTC)
        if self.revision(batch) is None:
            self.console.print(f"\n[bold]Batch {batch}[/]: files land in the landing zone of {PROMPT}")
            for item in land(self.settings, load_prompt(self.settings.prompts / f"{PROMPT}.yaml"), self.files(batch)):
                self.console.print(f"  {item['state']:9} {item['at']}", markup=False)
            took |= {f"ingest/{label}": s for label, s in ingest(airflow, self.console).seconds.items()}
        revision = self.revision(batch)
        if revision is None:
            raise RetuneError(f"ingest ended, but no dataset revision holds batch {batch}; see its log in Airflow, {stack.airflow_url}")
        self._account(revision, batch)
        run_id = self._under_way(batch, revision, airflow, begun)
        self.console.print(f"[bold]retrain_{PROMPT}[/] {run_id}")
        finished = follow(airflow, f"retrain_{PROMPT}", run_id, self.console)
        if finished.state != "success":
            raise RetuneError(explain_failure(airflow, finished))
        took |= finished.seconds
        if (through := self.decided(batch)) is None:
            raise RetuneError(f"no verdict on revision {revision.n}: {explain_nothing(airflow, finished)}")
        decision = through[1].body["decision"]
        self.console.print(f"[bold {COLOURS[decision['verdict']]}]{decision['verdict']}[/]  {decision['reasons'][0]}")

    def _under_way(self, batch: str, revision: Entry, airflow: Any, begun: datetime) -> str:
        """The run that the revision's Asset event started; the demo starts one itself only if there is none."""
        made = datetime.fromisoformat(revision.at)
        reason = f"demo, batch {batch}"
        run_id, _ = retrain_after(airflow, PROMPT, min(made, begun), {"overrides": {}, "force": False, "reason": reason})
        return run_id

    def _account(self, revision: Entry, batch: str) -> None:
        names = {f.name for f in self.files(batch)}
        self.console.print(f"  dataset revision {revision.n}: {revision.body['rows'][PROMPT]} rows of {PROMPT}")
        for key, item in revision.body["objects"][PROMPT].items():
            if Path(key).name in names:
                bad = item["quarantined"]
                count = sum(bad.values()) if isinstance(bad, dict) else bad
                parts = f"{item['kept']} kept + {item['duplicates']} duplicates + {count} quarantined"
                self.console.print(f"  {key}: {item['rows']} rows = {parts}", markup=False)

    def load_seconds(self) -> None:
        try:
            before = json.loads((self.settings.home / "demo.json").read_text("utf-8"))
            self.seconds = {r["batch"]: r["seconds"] for r in before["rounds"]} | dict(before.get("unfinished", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.seconds = {}

    def save(self, total: float) -> list[dict[str, Any]]:
        """Writes `demo.json` and returns its rounds."""
        rounds, unfinished = [], {}
        for batch in BATCHES:
            if through := self.decided(batch):
                rounds.append(round_report(batch, *through, PROMPT, self.seconds.get(batch, {})))
            elif batch in self.seconds:
                unfinished[batch] = self.seconds[batch]
        report = {"rounds": rounds, "total_seconds": round(total, 1)} | ({"unfinished": unfinished} if unfinished else {})
        write_private(self.settings.home / "demo.json", json.dumps(report, indent=1, ensure_ascii=False))
        return rounds


def summary(rounds: list[dict[str, Any]]) -> Table:
    """One row per release and round."""
    table = Table("round", "release", "macro-F1", "accuracy", "verdict", box=None, pad_edge=False)
    for item in rounds:
        names = {**ROLE_TITLES, CHAMPION: "champion until then", CANDIDATE: f"candidate {item['release'][:12]}"}
        verdict = f"[bold {COLOURS[item['verdict']]}]{item['verdict']}[/]" + (f" as version {item['version']}" if item["version"] else "")
        for role, metrics in item["metrics"].items():
            table.add_row(
                f"{item['batch']}: revision {item['dataset_revision']}, {item['rows']} rows" if role == "baseline" else "",
                names[role],
                *(f"{metrics[name]:.3f}" if metrics.get(name) is not None else "" for name in ("macro_f1", "accuracy")),
                verdict if role == "candidate" else "",
            )
    return table


def _show(console: Console, rounds: list[dict[str, Any]], settings: Settings) -> None:
    console.print("\nOn the same test rows in each round:")
    console.print(summary(rounds))
    for item in rounds:
        console.print(f"\n[bold]Round {item['batch']}[/]: {item['verdict']}, ledger entry {item['ledger_entry']}")
        for reason in item["reasons"]:
            console.print(f"  {reason}", markup=False)
        if item["seconds"]:
            console.print("  seconds: " + ", ".join(f"{task} {s:.1f}" for task, s in item["seconds"].items()), markup=False)
    console.print(
        f"\nThe same figures: {settings.home / 'demo.json'}, `retune status`, `retune releases {PROMPT}`, `retune ledger {PROMPT}`"
    )


def main() -> int:
    console = terminal()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both stop what the demo started
    try:
        return _main(console)
    except RetuneError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; `make demo` goes on from here", style="yellow")
        return 130


def _main(console: Console) -> int:
    begun = time.monotonic()
    settings = Settings.load()
    demo = _Demo(settings, open_store(settings.store, settings.s3_endpoint), console)
    demo.load_seconds()
    missing = [batch for batch in BATCHES if demo.decided(batch) is None]
    if not missing:
        console.print("Both batches have landed and were decided before; nothing is new. From the ledger:")
        _show(console, demo.save(_total(settings)), settings)
        return 0
    console.print(
        "[bold]Retune demo[/]: support tickets land in two batches. After each, Airflow takes the new rows in, tunes soft prompts of a "
        "small frozen language model, compares the best with the champion on the same test rows, and promotes it only if it is "
        "measurably better.\n"
        f"Everything runs on this machine; its state is in {settings.home}."
    )
    was_running = running(settings) is not None
    keep = was_running or os.environ.get("KEEP") == "1"
    done = False
    try:
        if not was_running:
            console.print("\nstarting Airflow and MLflow")
        stack, _ = start(settings, lambda event: _progress(console, event))
        console.print(f"  Airflow {stack.airflow_url} (user {stack.user}, password in {stack.password_file})")
        console.print(f"  MLflow  {without_password(stack.mlflow_url)}")
        demo.take_in_second()
        for batch in missing:
            demo.play(batch)
            demo.save(time.monotonic() - begun)
        done = True
    finally:
        if not done:
            demo.save(time.monotonic() - begun)
        if not keep:
            console.print("\nstopping what the demo started")
            stop(settings)
    _show(console, demo.save(time.monotonic() - begun), settings)
    if keep:
        console.print("Airflow and MLflow go on running; `make down` stops them.")
    else:
        console.print(f"`make up` opens Airflow and MLflow on all of it; `retune run {SECOND_PROMPT}` then tunes the second prompt.")
    return 0


def _total(settings: Settings) -> float:
    try:
        return float(json.loads((settings.home / "demo.json").read_text("utf-8"))["total_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _progress(console: Console, event: dict[str, Any]) -> None:
    if event["event"] == "healthy":
        console.print(f"  {event['component']} is up")
    elif event["event"] == "migrating":
        console.print("  first start: making Airflow's database")


if __name__ == "__main__":
    sys.exit(main())
