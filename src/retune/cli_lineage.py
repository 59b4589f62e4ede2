"""`retune checkout` and `reproduce`: from a recorded lineage back to files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retune.cli_output import AsJson, ShowCommand, console, emit, plain, shell
from retune.errors import BadInputError

if TYPE_CHECKING:
    from retune.checkout import Checkout, Part
    from retune.reproduce import Reproduction

__all__ = ["checkout", "reproduce"]

UNLIKE = 3
"""Exit code of `retune reproduce` where a file is not byte-identical."""


def checkout(
    release: Annotated[str | None, typer.Argument(help="A release id, or its beginning; none: live data, champions.")] = None,
    data: Annotated[int | None, typer.Option("--data", metavar="REVISION", help="A dataset revision, in place of a release.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="This prompt alone.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite uncommitted changes of the files.")] = False,
    as_json: AsJson = False,
    show_command: ShowCommand = False,
) -> None:
    """Lay data.dvc, dvc.lock and the prompt file of a release or revision into the working tree. `dvc pull` then brings the files."""
    from retune.checkout import lay, patch_text, plan, remote_commands, texts, uncommitted
    from retune.settings import Settings
    from retune.workspace import Workspaces

    workspaces = Workspaces(Settings.load())
    planned = plan(workspaces, release, data, prompt)
    project = workspaces.settings.project
    if show_command:
        if patch := patch_text(texts(project, planned.files), planned.files):
            plain(f"git apply <<'EOF'\n{patch}EOF")
        plain("\n".join(map(shell, remote_commands(workspaces))))
        return
    if (kept := uncommitted(project, planned.files)) and not force:
        raise BadInputError(f"{', '.join(kept)} hold changes that are not committed; commit them, or overwrite them with --force")
    written = lay(workspaces, planned.files)
    if as_json:
        prompts = [_part(part) for part in planned.parts]
        emit({"revision": planned.revision, "written": written, "prompts": prompts, "rewritten": planned.rewritten})
    else:
        _tell(planned, written)


def _part(part: "Part") -> dict[str, Any]:
    return {
        "prompt": part.prompt,
        "release": part.release,
        "revision": part.lineage.revision,
        "commit": part.lineage.commit,
        "dirty": part.lineage.dirty,
        "changed_code": part.changed_code,
    }


def _tell(planned: "Checkout", written: list[str]) -> None:
    out = console()
    out.print(f"dataset revision {planned.revision}; wrote {', '.join(written) or 'nothing: all of it is there'}")
    for sentence in planned.rewritten:
        out.print(f"[yellow]{sentence}[/]")
    for part in planned.parts:
        what = (
            f"release {part.release[:12]}, tuned on revision {part.lineage.revision}" if part.release else "what is known of the revision"
        )
        out.print(f"{part.prompt}: {what}")
        if part.changed_code:
            more = f" and {len(part.changed_code) - 3} more" if len(part.changed_code) > 3 else ""
            out.print(f"  its stages ran with other code ({', '.join(part.changed_code[:3])}{more}): `dvc repro` would run them again")
            uncommitted = ", which held uncommitted changes" if part.lineage.dirty else ""
            out.print(f"  to have that code, `git checkout {part.lineage.commit}`{uncommitted}, then this command again")
    made = [f"evaluate@{part.prompt}" for part in planned.parts if f"evaluate@{part.prompt}" in part.lineage.lock]
    # A bare pull fails on outputs that nobody has made yet, such as another prompt's release.
    out.print(f"next: [bold]dvc pull {f'-d {chr(32).join(made)}' if made else '--allow-missing'}[/]")


def reproduce(
    prompt: Annotated[str, typer.Argument(help="Name of a prompt.")],
    release: Annotated[str | None, typer.Option("--release", help="A release id, or its beginning; none: the champion.")] = None,
    keep: Annotated[Path | None, typer.Option("--keep", metavar="FOLDER", help="Keep the release made now in this new folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Preprocess and tune a release again from what is recorded, and compare every file. Exit code 3: not all are byte-identical."""
    from retune.recorded import named
    from retune.reproduce import reproduce
    from retune.settings import Settings
    from retune.store import open_store

    settings = Settings.load()
    recorded = named(open_store(settings), prompt, release)
    progress = console(stderr=as_json)
    result = reproduce(settings, recorded, keep, lambda line: progress.print(line, markup=False))
    if as_json:
        emit(result.to_json())
    else:
        _report(result)
    if result.differences is not None:
        raise typer.Exit(UNLIKE)


def _report(result: "Reproduction") -> None:
    out, release = console(), result.recorded.release
    for file in result.files:
        out.print(f"{'[green]equal[/]  ' if file.equal else '[yellow]differs[/]'}  {file.path}")
    if result.differences is None:
        out.print(f"[bold green]reproduced[/]: {len(result.files)} files, release {release[:12]}, byte for byte")
        return
    differing = sum(not file.equal for file in result.files)
    out.print(f"[bold yellow]{differing} of {len(result.files)} files differ[/]: release {release} became {result.release}")
    for name, value in result.differences.items():
        out.print(f"  {name.replace('_', ' ')}: {'not comparable' if value is None else f'{value:.3g}'}")
    for sentence in result.unlike or ["nothing that is recorded of machine and environment is unlike"]:
        out.print(f"  {sentence}", markup=False)
    out.print(f"  {'within' if result.within_tolerance else '[bold red]outside[/]'} the tolerance, {result.to_json()['tolerance']}")
