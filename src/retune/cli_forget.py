"""`retune forget` and `gc`: a person's rows out of everything that is kept; what nothing needs out of the store."""

import getpass
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retune.cli_output import AsJson, console, emit, reach_mlflow
from retune.errors import ConfigError

if TYPE_CHECKING:
    from retune.forget import Plan
    from retune.tasks.forget import Outcome

__all__ = ["forget", "gc"]

NOTHING = 4
"""Exit code of `retune forget` where nothing that is kept holds the rows."""


def forget(
    prompt: Annotated[str, typer.Argument(help="Name of a prompt file.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the ledger of the data.")],
    match: Annotated[
        list[str] | None, typer.Option("--match", metavar="COLUMN=VALUE", help="Rows that have this value; several: all of them.")
    ] = None,
    rows_file: Annotated[Path | None, typer.Option("--rows-file", metavar="FILE", help="The rows, in a file as it is landed.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", metavar="OBJECT:ROW", help="A row by its id; may be repeated.")] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Name no rows: go on with what earlier calls began or left.")] = False,
    releases: Annotated[bool, typer.Option("--releases", help="Delete releases tuned on the rows too, the champion apart.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although MLflow shows a run as running.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be rewritten, and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    by: Annotated[str | None, typer.Option("--by", help="Who, for the ledger; default: the user of this machine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Remove a person's rows from every dataset revision that is kept and from what was made of them, and say what was rewritten."""
    from retune.forget_files import Selection
    from retune.settings import Settings

    if finish == bool(match or rows_file or ids):
        raise ConfigError("name rows by --match, --rows-file or --id; or none with --finish")
    if as_json and not (yes or dry_run):
        raise ConfigError("--json asks nobody: add --yes, or --dry-run")
    selection = Selection(_pairs(match or []), frozenset(map(_id, ids or [])))
    reach_mlflow(Settings.load())
    from retune.tasks.forget import forget

    out = console(stderr=as_json)

    def agree(found: "Plan") -> bool:
        if yes:
            return True
        _show(found)
        return typer.confirm("Rewrite these? It cannot be undone", err=True)

    done = forget(
        prompt,
        selection,
        by or getpass.getuser(),
        reason,
        rows_file=rows_file,
        releases=releases,
        force=force,
        dry_run=dry_run,
        agree=agree,
        log=lambda line: out.print(line, markup=False),
    )
    if as_json:
        emit({**done.to_json(), "dry_run": dry_run})
    else:
        _tell(done, dry_run)
    if done.plan.empty and not done.finished:
        raise typer.Exit(0 if finish else NOTHING)


def _pairs(assignments: list[str]) -> Mapping[str, str]:
    pairs = [assignment.partition("=") for assignment in assignments]
    if wrong := [assignment for assignment, (name, _, value) in zip(assignments, pairs, strict=True) if not (name and value)]:
        raise ConfigError(f"--match must be COLUMN=VALUE such as customer=4711, got {wrong[0]!r}")
    return {name: value for name, _, value in pairs}


def _id(text: str) -> str:
    number, _, row = text.partition(":")
    if not (number.isdigit() and row.isdigit()):
        raise ConfigError(f"--id must be OBJECT:ROW as splits and reports name a row, such as 3:17, got {text!r}")
    return f"{int(number)}:{int(row)}"


def _show(found: "Plan") -> None:
    from rich.table import Table

    table = Table("what", "where", "rewritten", box=None, pad_edge=False)
    for n, taken in sorted(found.revisions.items()):
        more = f", {taken['quarantined']} quarantined" if taken["quarantined"] else ""
        table.add_row("dataset revision", str(n), f"{taken['kept']} row(s) less{more}")
    for old, new in sorted(found.paths.items()):
        table.add_row("part", f"data/{old}", f"data/{new}" if new else "gone: no row is left")
    for path in sorted(set(found.tables)):
        table.add_row("derived table", f"artifacts/{found.prompt}/{path}", f"{found.tables.count(path)} time(s)")
    if found.sections:
        table.add_row("section index", f"sections/{found.prompt}/", f"{len(found.sections)} entries go: computed anew when needed")
    for release, fate in [*found.releases_holding.items(), *found.releases_tuned.items()]:
        held = "holds the rows" if release in found.releases_holding else "tuned on the rows"
        table.add_row("release", release[:12], f"{held}: {FATES[fate]}")
    console().print(table)


FATES = {"champion": "still the champion, until it is replaced", "kept": "kept (--releases deletes it)", "deleted": "deleted"}


def _tell(done: "Outcome", dry_run: bool) -> None:
    out, found = console(), done.plan
    if found.empty:
        out.print("what earlier calls left is deleted now" if done.finished else f"nothing that is kept of {found.prompt} holds such rows")
    else:
        _show(found)
    if done.entry is not None:
        gone = done.swept
        out.print(
            f"[bold]forgotten[/]: {len(found.ids)} row(s) and {len(found.quarantined)} quarantined, at dataset revision {done.entry.n}"
        )
        out.print(f"deleted: {len(gone.objects)} objects of the store, {len(gone.cached)} of this host's caches, ", end="")
        out.print(f"{len(gone.checkpoints)} checkpoints, pages of {len(done.runs)} MLflow runs, files of {len(done.versions)} versions")
        out.print("run `retune gc` on every host once what runs there is over: caches hold copies that nothing names any more")
    if found.also_in:
        out.print(
            f"the same rows stand in {', '.join(found.also_in)}, of the same source: forget them there too, by `retune forget PROMPT`"
        )
    if "champion" in {**found.releases_tuned, **found.releases_holding}.values():
        out.print(f"the champion came of the rows: replace it by `retune run {found.prompt}`, then `retune forget {found.prompt} --finish`")
    if dry_run:
        out.print("nothing was written: a dry run")


def gc(
    older_than: Annotated[float, typer.Option("--older-than", metavar="DAYS", min=0.0, help="Only what is at least so old.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete from the store what no dataset revision, release, ledger entry, section or commit names. What they name always stays."""
    from rich.table import Table

    from retune.collect import DAY, KINDS, collect, collectable, folders
    from retune.forget import sweep
    from retune.rewritten import Rewritten
    from retune.settings import Settings
    from retune.store import open_store

    settings = Settings.load()
    store = open_store(settings)
    progress = console(stderr=as_json)
    found = [*collectable(store, settings, older_than * DAY), *folders(max(older_than, 1.0) * DAY)]
    if not dry_run:
        found = collect(store, settings, found, lambda line: progress.print(line, markup=False))
    forgotten = sweep(store, settings, Rewritten.of(store), dry_run)
    kinds: dict[str, dict[str, Any]] = {
        kind: {"count": sum(i.kind == kind for i in found), "bytes": sum(i.size for i in found if i.kind == kind)} for kind in KINDS
    }
    if as_json:
        emit(
            {"store": store.url, "dry_run": dry_run, "kinds": kinds, "forgotten": forgotten.to_json(), "keys": [item.key for item in found]}
        )
        return
    table = Table("kind", "number", "bytes", "", box=None, pad_edge=False)
    for kind, figures in kinds.items():
        table.add_row(kind, f"{figures['count']:,}", f"{figures['bytes']:,}", KINDS[kind])
    console().print(table)
    if forgotten:
        console().print(f"left of forgotten rows: {len(forgotten.objects)} objects, {len(forgotten.cached)} in this host's caches")
    total = sum(item.size for item in found)
    console().print(f"{'would free' if dry_run else 'freed'} {total:,} bytes of {store.url} and this host", markup=False)
