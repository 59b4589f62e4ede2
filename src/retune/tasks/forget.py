"""`retune forget` as a whole: what is named, the plan, the entry of the ledger, and what goes from store, caches and MLflow."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from retune.config import Prompt, load_prompt
from retune.data.ingest import fields_of, layout_of
from retune.data.read import open_reading
from retune.errors import BadInputError, ConfigError, ConflictError
from retune.forget import Plan, Swept, append, plan, sweep
from retune.forget_files import Selection
from retune.ledger import Entry
from retune.rewritten import Rewritten
from retune.settings import Settings
from retune.tasks.context import Context, Json

__all__ = ["PAGES", "Outcome", "forget", "texts_of"]

ATTEMPTS = 5
"""How often the rows are looked for again, where an ingest was quicker."""
PAGES = ("dataset", "decision/report.html", "predictions.json", "predictions.parquet")
"""Artifacts of a DAG run's MLflow run in which rows of its data stand; a folder with all that is in it."""
FORGOTTEN = "retune.forgotten"
"""Tag of an MLflow run or version whose pages or files went: the dataset revision at which."""


@dataclass(frozen=True)
class Outcome:
    plan: Plan
    entry: Entry | None
    """None where nothing that is kept holds the rows, and in a dry run."""
    swept: Swept
    runs: list[str]
    """MLflow runs whose pages were deleted."""
    versions: list[str]
    """Versions in MLflow's registry whose files were deleted."""

    @property
    def finished(self) -> bool:
        """Whether something went that an earlier call had left."""
        return self.entry is None and bool(self.swept or self.runs or self.versions)

    def to_json(self) -> Json:
        deleted = {**self.swept.to_json(), "mlflow_runs": self.runs, "mlflow_versions": self.versions}
        return {**self.plan.to_json(), "revision": self.entry.n if self.entry else None, "deleted": deleted}


def forget(
    name: str,
    selection: Selection,
    by: str,
    reason: str,
    *,
    rows_file: Path | None = None,
    releases: bool = False,
    force: bool = False,
    dry_run: bool = False,
    agree: Callable[[Plan], bool] = lambda _: True,
    log: Callable[[str], None] = print,
) -> Outcome:
    """Rewrites everything that holds the rows, and deletes what it took the place of. Nothing but finishes earlier calls if none does.

    `agree`: is shown the plan before anything is written. `force`: go on beside a run that MLflow shows as running.
    Raises ConflictError for such a run, or if others keep changing the data; BadInputError where nobody agreed or there are no data.
    Retry: a call that was killed is finished by the next one.
    """
    context = Context.load(load_prompt(Settings.load().prompts / f"{name}.yaml"))
    if unknown := sorted(set(selection.match) - set(fields_of(context.prompt).names)):
        names = ", ".join(fields_of(context.prompt).names)
        raise ConfigError(f"--match must name a column that is kept of {name} ({names}), got {', '.join(unknown)}; or name a --rows-file")
    if not force:
        _check_idle(context)
    context.workspaces.log = log
    texts = texts_of(context.prompt, rows_file) if rows_file else []
    entry = None
    for _ in range(ATTEMPTS):
        found = plan(context.workspaces, context.prompt, selection, texts, releases)
        if dry_run:
            return Outcome(found, None, Swept(), [], [])
        if found.empty:
            break
        if not agree(found):
            raise BadInputError("nothing was forgotten: nobody agreed")
        if not force:
            _check_idle(context)  # one may have begun while somebody was asked
        try:
            entry = append(context.workspaces, found, by, reason)
        except ConflictError as lost:
            log(f"{lost}; looking again")
            continue
        break
    else:
        raise ConflictError(f"the data changed {ATTEMPTS} times while rows of {name} were looked for; run it again")
    rewritten = Rewritten.of(context.workspaces.store)
    swept = sweep(context.workspaces.store, context.settings, rewritten)
    return Outcome(found, entry, swept, _clear_runs(context, rewritten), _clear_versions(context, rewritten))


def _check_idle(context: Context) -> None:
    if active := context.tracker.active():
        listed = ", ".join(f"{run} ({title})" for run, title in active)
        raise ConflictError(
            f"a run of {context.prompt.name} is active in MLflow: {listed}. It may write what is to be forgotten: wait for it, then run "
            "this again. If it was killed and only seems to run, say --force"
        )


def texts_of(prompt: Prompt, file: Path) -> list[tuple[str, ...]]:
    """Input texts of the rows of a file that is written as files are landed; labels and slices may be missing.

    Raises BadInputError for a file or row that cannot be read.
    """
    if not file.is_file():
        raise BadInputError(f"--rows-file must be a file, got {file}")
    layout = layout_of(prompt)
    columns = {name: layout.columns[name] for name in prompt.inputs}
    texts: list[tuple[str, ...]] = []
    for chunk in open_reading(file, file.name, replace(layout, columns=columns)).chunks:
        if chunk.malformed:
            raise BadInputError(f"{file}: row {chunk.malformed[0].row} cannot be read: {chunk.malformed[0].reason}; mend it")
        texts += list(zip(*(chunk.frame.dropna()[name] for name in prompt.inputs), strict=True))
    return texts


def _clear_runs(context: Context, rewritten: Rewritten) -> list[str]:
    """Deletes the pages in which rows of a rewritten revision stand from the DAG runs' MLflow runs, and says so on the runs."""
    revisions: dict[str, int] = {}
    for entry in rewritten.entries:
        if entry.body["forget"]["prompt"] == context.prompt.name:
            revisions |= dict.fromkeys(entry.body["forget"]["revisions"], entry.n)
    cleared = []
    for run in context.tracker.tagged("retune.dataset_revision", sorted(revisions)):
        now = str(revisions[run.data.tags["retune.dataset_revision"]])
        # Whatever the tag says: a run that was active then has written its pages since.
        if sum(context.tracker.delete(run.info.run_id, page) for page in PAGES):
            context.tracker.tags(run.info.run_id, {FORGOTTEN: now})
            cleared.append(str(run.info.run_id))
    return cleared


def _clear_versions(context: Context, rewritten: Rewritten) -> list[str]:
    """Deletes the files of registered releases that went. Their versions stay, so that aliases and the ledger lead somewhere."""
    cleared = []
    for release, n in rewritten.deleted().items():
        version = context.registry.find(release)
        if version is not None and version.tags.get(FORGOTTEN) is None:
            context.registry.empty(version, f"Its files were deleted by retune forget at dataset revision {n}.")
            context.registry.client.set_model_version_tag(context.prompt.name, version.version, FORGOTTEN, str(n))
            cleared.append(str(version.version))
    return cleared
