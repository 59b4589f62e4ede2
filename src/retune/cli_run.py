"""`retune run` and `land`."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retune.cli_output import AsJson, ShowCommand, console, emit, plain, shell, stack_or_error
from retune.errors import ConfigError, RetuneError

if TYPE_CHECKING:
    from rich.console import Console

    from retune.ledger import Entry
    from retune.local.airflow_api import Airflow
    from retune.local.progress import Finished
    from retune.settings import Settings

__all__ = ["land", "overrides", "run"]

INGEST = "ingest"


def overrides(assignments: list[str]) -> dict[str, Any]:
    """`["tune.seed=14"]` -> `{"tune.seed": 14}`; a value that is no JSON is text. Raises ConfigError on anything but KEY=VALUE."""
    found: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set must be KEY=VALUE such as tune.learning_rate=0.01, got {assignment!r}")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def run(
    prompt: Annotated[str, typer.Argument(help="Prompt to retrain, or `ingest`.")],
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a field of the prompt file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go through even if the same inputs were decided before.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in MLflow and the ledger.")] = "",
    approval: Annotated[bool, typer.Option("--approval", help="Ask a person in Airflow before promotion.")] = False,
    patch: Annotated[bool, typer.Option("--patch", help="Write data.dvc and dvc.lock of the run as a git patch in MLflow.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Start it and return.")] = False,
    first_ingest: Annotated[bool, typer.Option("--ingest", help="Take in what has landed first.")] = False,
    as_json: AsJson = False,
    show_command: ShowCommand = False,
) -> None:
    """Start a DAG run, follow it, and show the verdict with its reasons. Fails if the run fails, not if the gate holds."""
    from retune.config import load_prompt, load_prompts, override
    from retune.settings import Settings

    settings = Settings.load()
    dag, conf = INGEST, dict[str, Any]()
    if prompt != INGEST:
        dag, conf = f"retrain_{prompt}", {"overrides": overrides(assignments or []), "force": force, "reason": reason}
        conf |= {"approval": approval, "patch": patch}
        override(load_prompt(settings.prompts / f"{prompt}.yaml"), conf["overrides"])  # a wrong one fails here, not in ten seconds
    elif assignments or force or first_ingest or approval or patch:
        raise ConfigError("--set, --force, --approval, --patch and --ingest belong to a prompt's run, not to `retune run ingest`")
    if first_ingest and approval:
        raise ConfigError("--approval with --ingest: the run that new data start by themselves would not ask; set promote.approval: true")
    if show_command:
        words = ["airflow", "dags", "trigger", dag, *(["--conf", json.dumps(conf)] if conf else [])]
        plain(shell(words, {"AIRFLOW_HOME": str(settings.home / "airflow")}))
        return
    stack = stack_or_error(settings)
    from retune.local.rounds import connect, explain_failure, ingest, retrain_after, start_run

    out, airflow = console(stderr=as_json), connect(stack)
    run_id = None
    if first_ingest and no_wait:
        raise ConfigError("--ingest waits for the ingest before it starts the run; leave out --no-wait")
    if first_ingest or dag == INGEST:
        for name in load_prompts(settings.prompts):
            airflow.wait_for_task(INGEST, f"ingest_{name}")  # Airflow reads a new prompt file within half a minute
    if first_ingest:
        begun = datetime.now(UTC)
        before = _revision(settings)
        ingest(airflow, out)
        if _revision(settings) != before and not (conf["overrides"] or force or patch):
            run_id, _ = retrain_after(airflow, prompt, begun, conf)  # the new revision's own event starts it
    if run_id is None:
        run_id = start_run(airflow, dag, conf, reason or None)
    url = f"{stack.airflow_url}/dags/{dag}/runs/{run_id}"
    if no_wait:
        emit({"dag_id": dag, "dag_run_id": run_id, "url": url}) if as_json else plain(f"{run_id}\n{url}")
        return
    out.print(f"[bold]{dag}[/] {url}")
    if approval:
        out.print(f"before a promotion it asks under Required Actions: {url}/required_actions")
    finished = _follow(airflow, dag, run_id, out)
    if finished.state != "success":
        raise RetuneError(explain_failure(airflow, finished))
    _conclude(settings, airflow, prompt, finished, out, as_json)


def _revision(settings: "Settings") -> int | None:
    from retune.ledger import Ledger
    from retune.store import open_store

    head = Ledger(open_store(settings.store, settings.s3_endpoint), "dataset").head()
    return head.n if head else None


def _follow(airflow: "Airflow", dag: str, run_id: str, out: "Console") -> "Finished":
    from retune.local.progress import follow

    try:
        return follow(airflow, dag, run_id, out)
    except KeyboardInterrupt:
        out.print(f"no longer looking; {run_id} goes on in Airflow")
        raise


def _conclude(settings: "Settings", airflow: "Airflow", prompt: str, finished: "Finished", out: "Console", as_json: bool) -> None:
    from retune.local.rounds import explain_nothing, verdict_of
    from retune.store import open_store

    result: dict[str, Any] = {"dag_id": finished.dag, "dag_run_id": finished.run_id, "state": finished.state, "seconds": finished.seconds}
    entry = None if prompt == INGEST else verdict_of(open_store(settings.store, settings.s3_endpoint), prompt, finished.run_id)
    if prompt == INGEST:
        result["revision"] = _revision(settings)
        words = [f"dataset revision {result['revision']}"]
    elif entry is None:
        result |= {"verdict": None, "reason": explain_nothing(airflow, finished)}
        words = [result["reason"]]
    else:
        decision = entry.body["decision"]
        result |= {
            "verdict": decision["verdict"],
            "reasons": decision["reasons"],
            "ledger_entry": entry.n,
            "candidate": entry.body["candidate"],
        }
        words = _verdict(entry)
    if as_json:
        emit(result)
    else:
        for line in words:
            out.print(line)


def _verdict(entry: "Entry") -> list[str]:
    decision = entry.body["decision"]
    colour = {"PROMOTE": "green", "HOLD": "yellow", "REJECT": "red"}[decision["verdict"]]
    return [f"[bold {colour}]{decision['verdict']}[/]  (ledger entry {entry.n})", *(f"  {reason}" for reason in decision["reasons"])]


def land(
    prompt: Annotated[str, typer.Argument(help="Prompt whose landing zone it is.")],
    files: Annotated[list[Path], typer.Argument(help="CSV, TSV, JSON Lines or Parquet, the first three also as .gz.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace files of the same name that hold something else.")] = False,
    as_json: AsJson = False,
    show_command: ShowCommand = False,
) -> None:
    """Copy files into a prompt's landing zone, each whole or not at all. The next ingest takes them in."""
    from retune.config import load_prompt
    from retune.settings import Settings

    settings = Settings.load()
    definition = load_prompt(settings.prompts / f"{prompt}.yaml")
    if show_command:
        zone = definition.source.path
        if zone.startswith("s3://"):
            plain("\n".join(shell(["aws", "s3", "cp", str(f), f"{zone.rstrip('/')}/{f.name}"]) for f in files))
        else:
            plain(shell(["cp", *map(str, files), f"{settings.project / zone}/"]))
        return
    from retune.local.landing import land

    landed = land(settings, definition, files, replace)
    if as_json:
        emit({"files": landed})
        return
    for item in landed:
        console().print(f"{item['state']:9}  {item['at']}", markup=False)
