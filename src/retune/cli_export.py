"""`retune export`: a release for another server."""

from pathlib import Path
from typing import Annotated

import typer

from retune.cli_output import AsJson, console, emit

__all__ = ["export"]


def export(
    prompt: Annotated[str, typer.Argument(help="Name of a prompt.")],
    release: Annotated[str | None, typer.Option("--release", help="A release id, or its beginning; none: the champion.")] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="A new folder; default: PROMPT-RELEASE here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a release's soft prompt for vLLM's prompt embeddings, with the code that builds a request of it."""
    from retune.export import export
    from retune.settings import Settings
    from retune.tuned import open_tuned
    from retune.workspace import Workspaces

    tuned = open_tuned(Workspaces(Settings.load()), prompt, release)
    folder = to or Path(f"{prompt}-{tuned.recorded.release[:12]}")
    description = export(tuned, folder)
    if as_json:
        emit({"folder": folder, **description})
        return
    tokens, hidden_size = description["tensor"]["shape"]
    out = console()
    out.print(f"wrote {folder}: {tokens} virtual tokens of {hidden_size} numbers, release {tuned.recorded.release[:12]}", markup=False)
    out.print(f"next: {folder / 'README.md'} shows how to serve the base model and to build a request", markup=False)
