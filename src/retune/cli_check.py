"""`retune check`: a prompt's tests in git on one of its releases."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retune.cli_output import AsJson, console, emit

if TYPE_CHECKING:
    from retune.records import CheckResult

__all__ = ["check"]


def check(
    prompt: Annotated[str, typer.Argument(help="Name of a prompt file.")],
    release: Annotated[
        str | None, typer.Option("--release", help="`previous`, a version, a release id or its beginning; none: the champion.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Another file of checks than prompts/PROMPT.checks.yaml.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a prompt's checks on its champion or another release. Exit code 1: a required check failed."""
    from retune.checks import checks_file, load_checks, run_checks
    from retune.config import load_prompt
    from retune.recorded import named
    from retune.settings import Settings
    from retune.workspace import Workspaces

    settings = Settings.load()
    place = file or checks_file(settings.prompts, prompt)
    checks = load_checks(place, load_prompt(settings.prompts / f"{prompt}.yaml"))  # a wrong file is told before torch is imported
    workspaces = Workspaces(settings)
    recorded = named(workspaces.store, prompt, release)
    from retune.tuned import open_predictor

    results = run_checks(checks, open_predictor(workspaces, recorded).answer)
    passed = all(result.passed for result in results if result.required)
    if as_json:
        found = [result.to_json() for result in results]
        emit({"prompt": prompt, "release": recorded.release, "file": str(place), "passed": passed, "checks": found})
    else:
        _show(results, f"{prompt}, release {recorded.release[:12]}, {place}")
    if not passed:
        raise typer.Exit(1)


def _show(results: list["CheckResult"], title: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    out.print(title, markup=False)
    table = Table("check", "required", "outcome", "reason", box=None, pad_edge=False)
    for result in results:
        colour = "green" if result.passed else "red" if result.required else "yellow"
        outcome = f"[{colour}]{'passed' if result.passed else 'failed'}[/]"
        table.add_row(escape(result.name), "yes" if result.required else "no", outcome, escape(result.reason))
    out.print(table)
