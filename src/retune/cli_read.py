"""`retune releases`, `ledger`, `predict` and `doctor`: reading, nothing else."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retune.cli_output import AsJson, ShowCommand, console, emit, figures, plain, stack_or_error, when
from retune.errors import BadInputError, ConfigError
from retune.settings import without_password

if TYPE_CHECKING:
    from retune.ledger import Ledger
    from retune.settings import Settings

__all__ = ["doctor", "ledger", "predict", "releases"]

DATASET = "dataset"
PromptName = Annotated[str, typer.Argument(help="Name of a prompt file.")]


def _ledger(settings: "Settings", name: str) -> "Ledger":
    from retune.config import load_prompt
    from retune.ledger import Ledger
    from retune.store import open_store

    if name != DATASET:
        load_prompt(settings.prompts / f"{name}.yaml")  # a wrong name is told from an empty ledger
    return Ledger(open_store(settings.store, settings.s3_endpoint), name)


def releases(prompt: PromptName, as_json: AsJson = False) -> None:
    """List what was released or judged, newest first, with what became of it."""
    from rich.table import Table

    from retune.ledger import standing
    from retune.settings import Settings

    settings = Settings.load()
    entries = _ledger(settings, prompt).entries()
    now = standing(entries) if entries else None
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        judged = entry.body.get("candidate") or entry.body.get("champion") or {}
        if release := judged.get("release"):
            before = found.pop(release, {})
            found[release] = {
                "release": release,
                "version": judged.get("version") or before.get("version"),
                "verdict": entry.kind,
                "at": entry.at,
                "entry": entry.n,
                "revision": entry.body.get("dataset_revision"),
                "metrics": judged.get("metrics") or before.get("metrics") or {},
                "champion": bool(now and now.champion and release == now.champion["release"]),
                "previous": bool(now and now.previous and release == now.previous["release"]),
                "barred": bool(now and release in now.barred),
            }
    listed = list(reversed(found.values()))
    if as_json:
        emit({"prompt": prompt, "releases": listed})
        return
    table = Table("release", "version", "verdict", "when", "revision", "metrics", "", box=None, pad_edge=False)
    for item in listed:
        marks = ", ".join(mark for mark in ("champion", "previous", "barred") if item[mark])
        cells = (
            item["release"][:12],
            item["version"],
            item["verdict"],
            when(item["at"]),
            item["revision"],
            figures(item["metrics"]),
            marks,
        )
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    console().print(table if listed else f"no release of {prompt} yet; land data, then `retune run {prompt} --ingest`")


def ledger(
    name: Annotated[str, typer.Argument(help="Name of a prompt, or `dataset`.")],
    verify: Annotated[bool, typer.Option("--verify", help="Recompute the chain of hashes.")] = False,
    as_json: AsJson = False,
) -> None:
    """List every decision on a prompt, or every revision of the data, oldest first."""
    from rich.table import Table

    from retune.settings import Settings

    entries = _ledger(Settings.load(), name).entries()  # raises IntegrityError where the chain does not hold
    if as_json:
        listed = [
            {"n": e.n, "sha256": e.sha256, "at": e.at, "kind": e.kind, "by": e.by, "reason": e.reason, "body": e.body} for e in entries
        ]
        emit({"ledger": name, "entries": listed, **({"verified": True} if verify else {})})
        return
    table = Table("n", "when", "kind", "by", "reason", "sha256", box=None, pad_edge=False)
    for e in entries:
        table.add_row(str(e.n), when(e.at), e.kind, e.by, e.reason, e.sha256[:12])
    console().print(table if entries else f"the ledger {name} is empty")
    if verify:
        console().print(f"verified: {len(entries)} entries, each names the one before by its sha256")


def predict(
    prompt: PromptName,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="JSON Lines with the prompt's input fields.")] = None,
    alias: Annotated[str, typer.Option("--alias", help="champion or previous.")] = "champion",
    release: Annotated[str | None, typer.Option("--release", help="A release id, or its beginning, in place of an alias.")] = None,
    as_json: AsJson = False,
    show_command: ShowCommand = False,
) -> None:
    """Answer texts with the champion, as any MLflow user would load it."""
    from retune.config import load_prompt
    from retune.settings import Settings

    settings = Settings.load()
    definition = load_prompt(settings.prompts / f"{prompt}.yaml")
    rows = _rows(definition.inputs, text or [], file)
    import os

    uri = os.environ.get("MLFLOW_TRACKING_URI") or stack_or_error(settings).mlflow_url
    place = f"models:/{prompt}/{_version(settings, prompt, release)}" if release else f"models:/{prompt}@{alias}"
    models = os.pathsep.join(map(str, settings.base_models))
    if show_command:
        plain(
            f"MLFLOW_TRACKING_URI={without_password(uri)} RETUNE_BASE_MODELS={models} python - <<'EOF'\nimport mlflow.pyfunc, pandas\n"
            f"rows = pandas.DataFrame({rows!r})\nprint(mlflow.pyfunc.load_model({place!r}).predict(rows))\nEOF"
        )
        return
    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("RETUNE_BASE_MODELS", models)
    answers = _answers(place, rows)
    if as_json:
        emit({"model": place, "predictions": answers})
        return
    for row, answer in zip(rows, answers, strict=True):
        scores = ", ".join(f"{k.removeprefix('p_')} {v:.2f}" for k, v in answer.items() if k.startswith("p_"))
        console().print(f"{answer['prediction']}{f'  ({scores})' if scores else ''}  {str(next(iter(row.values())))[:80]}", markup=False)


def _rows(inputs: tuple[str, ...], texts: list[str], file: Path | None) -> list[dict[str, Any]]:
    if bool(texts) == (file is not None):
        raise ConfigError("give either --text or --file")
    if texts:
        if len(inputs) > 1:
            raise ConfigError(f"the template names {', '.join(inputs)}: pass them as --file rows.jsonl, one JSON object a line")
        return [{inputs[0]: text} for text in texts]
    assert file is not None  # noqa: S101 - the first check leaves no other case
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
        return [{name: row[name] for name in inputs} for row in rows]
    except FileNotFoundError:
        raise BadInputError(f"no such file: {file}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{file}: must hold one JSON object a line with {', '.join(inputs)}: {error!r}") from None


def _version(settings: "Settings", prompt: str, release: str) -> str:
    versions = {}
    for entry in _ledger(settings, prompt).entries():
        for part in (entry.body.get("candidate"), entry.body.get("champion")):
            if part and part.get("version") and part["release"].startswith(release):
                versions[part["release"]] = str(part["version"])
    if len(versions) != 1:
        raise BadInputError(f"--release {release} names {len(versions)} registered releases; see `retune releases {prompt}`")
    return versions.popitem()[1]


def _answers(place: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.exceptions import MlflowException

    try:
        model = mlflow.pyfunc.load_model(place)
    except MlflowException as error:
        raise BadInputError(f"{place} cannot be loaded: {error.message}; is anything released yet? See `retune status`") from None
    frame: pd.DataFrame = model.predict(pd.DataFrame(rows))
    records: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return records


def doctor(as_json: AsJson = False) -> None:
    """Check versions, disk, store, base models, DVC, ports and the stack; say what to do about what is wrong."""
    from rich.markup import escape

    from retune.local.doctor import examine
    from retune.settings import Settings

    out, checks = console(), examine(Settings.load())
    failed = any(check.state == "fail" for check in checks)
    if as_json:
        emit({"healthy": not failed, "checks": [check.to_json() for check in checks]})
    else:
        for check in checks:
            colour = {"ok": "green", "warn": "yellow", "fail": "red"}[check.state]
            out.print(f"[{colour}]{check.state:4}[/]  {check.name}: {escape(check.finding)}")
            if check.way_out:
                out.print(f"      -> {escape(check.way_out)}")
    if failed:
        raise typer.Exit(1)
