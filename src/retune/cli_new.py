"""`retune new`: a prompt file from a sample of the user's own data."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retune.cli_output import AsJson, console, emit, plain
from retune.errors import BadInputError, ConfigError

if TYPE_CHECKING:
    from retune.draft import Draft
    from retune.policy import BaseModelRef
    from retune.settings import Settings

__all__ = ["new"]

EXAMPLE = "examples/base_model"
HUB = re.compile(r"hub:([^@\s]+/[^@\s]+)@([0-9a-f]{40})")


def new(
    prompt: Annotated[str, typer.Argument(help="Name of the new prompt: small letters, digits and underscores.")],
    sample: Annotated[Path, typer.Option("--from", metavar="FILE", help="CSV, TSV, JSONL (each also .gz) or Parquet.")],
    text: Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="Column that the model reads.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="COLUMN", help="Column that it answers with.")] = None,
    base_model: Annotated[
        str, typer.Option("--base-model", metavar="PATH|hub:ORG/NAME@REVISION", help="Folder, or hub id with a full commit.")
    ] = EXAMPLE,
    force: Annotated[bool, typer.Option("--force", help="Write over a prompt file that is there.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the file, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draft a prompt file from a sample of your own data, and say what was guessed and why."""
    from retune.draft import draft, prompt_yaml, read_sample
    from retune.settings import Settings

    settings = Settings.load()
    path = settings.prompts / f"{prompt}.yaml"
    if path.exists() and not (force or show):
        raise ConfigError(f"{path} is there already: choose another name, pass --force to write over it, or --show to see the draft")
    rows = read_sample(sample)
    drafted = draft(rows, text, target)
    written = prompt_yaml(prompt, rows, drafted, _base_model(base_model, settings), sample.name)
    _check(prompt, written)
    if show and not as_json:
        plain(written)
        return
    if not show:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written, "utf-8")
        _name_in_params(settings, prompt)
    following = [f"retune land {prompt} {sample}", "retune run ingest", f"retune run {prompt}"]
    if as_json:
        found = {"text": drafted.text, "target": drafted.target, "task": drafted.task, "labels": drafted.labels, "slices": drafted.slices}
        emit({"prompt": prompt, "file": str(path), "written": not show, **found, "text_of_file": written, "next": following})
        return
    out = console()
    for line in _account(len(rows.frame), rows.malformed, drafted):
        out.print(line, markup=False)
    out.print(f"wrote {path}; read it, then:", markup=False)
    for command in ("retune up", *following):
        out.print(f"  {command}", markup=False)


def _account(rows: int, malformed: int, drafted: "Draft") -> list[str]:
    lines = [
        f"{rows:,} rows read" + (f", {malformed:,} more could not be" if malformed else ""),
        f"text:   {drafted.text!r} ({drafted.text_reason})",
        f"target: {drafted.target!r} ({drafted.target_reason})",
        f"task:   {drafted.task} ({drafted.task_reason})",
    ]
    if drafted.labels:
        lines.append(f"labels: {', '.join(drafted.labels)}")
    if drafted.slices:
        lines.append(f"slices: {', '.join(str(column) for column in drafted.slices)}")
    return lines


def _base_model(value: str, settings: "Settings") -> "BaseModelRef":
    from retune.policy import BaseModelRef

    if match := HUB.fullmatch(value):
        return BaseModelRef(hub=match[1], revision=match[2])
    if value.startswith("hub:"):
        raise ConfigError(f"--base-model must be hub:ORG/NAME@REVISION with the full commit of 40 hex digits, got {value!r}")
    folder = settings.project / value
    if not (folder / "config.json").is_file():
        raise BadInputError(f"--base-model must be a folder with config.json (relative to {settings.project}), got {value!r}")
    from retune.inference.base_model import folder_sha256

    return BaseModelRef(path=value, sha256=folder_sha256(folder))


def _check(prompt: str, written: str) -> None:
    """Loads the file as every other command will. Raises ConfigError."""
    from retune.config import load_prompt

    if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", prompt):
        raise ConfigError(f"PROMPT must be small letters, digits and underscores, a letter first, got {prompt!r}")
    with tempfile.TemporaryDirectory(prefix="retune-new-") as scratch:
        path = Path(scratch) / f"{prompt}.yaml"
        path.write_text(written, "utf-8")
        load_prompt(path)


def _name_in_params(settings: "Settings", prompt: str) -> None:
    """Adds the name to params.yaml, by which `dvc repro` knows it. Raises ConfigError where that file is not as it was made."""
    import yaml

    path = settings.project / "params.yaml"
    if settings.prompts != settings.project / "prompts" or not path.is_file():
        return
    text = path.read_text("utf-8")
    known = yaml.safe_load(text)["prompts"]
    if prompt in known:
        return
    longer = f"{text.rstrip()}\n- {prompt}\n"
    if yaml.safe_load(longer).get("prompts") != [*known, prompt]:
        raise ConfigError(f"{path}: add {prompt} to the list `prompts` by hand; the prompt file is written")
    path.write_text(longer, "utf-8")
