"""A recorded lineage as files of a checkout: data.dvc, dvc.lock and the prompt file; laid by `retune checkout`, or as a git patch."""

import difflib
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from retune.config import load_prompt, load_prompts
from retune.dvc_files import lock_text, sections
from retune.errors import BadInputError, ConfigError, StageError
from retune.ledger import Entry, Ledger
from retune.recorded import champion, find
from retune.records import Lineage
from retune.rewritten import DATASET, Rewritten
from retune.workspace import Workspaces

__all__ = ["Checkout", "Part", "laid", "lay", "lineage_patch", "patch_text", "plan", "remote_commands", "texts", "uncommitted"]

DATA, LOCK = "data.dvc", "dvc.lock"


@dataclass(frozen=True)
class Part:
    """What stands for one prompt in a checkout."""

    prompt: str
    release: str | None
    """None where no release is laid, but what is known of a dataset revision."""
    lineage: Lineage
    changed_code: list[str]
    """Paths of the checkout that are not the code that the stages ran with."""


@dataclass(frozen=True)
class Checkout:
    """Files to lay."""

    revision: int
    """Number of the dataset revision in data.dvc."""
    parts: list[Part]
    files: dict[str, str]
    """Path -> text."""
    rewritten: list[str]
    """What was forgotten of the data since they were recorded, a sentence each."""


def plan(workspaces: Workspaces, release: str | None = None, revision: int | None = None, prompt: str | None = None) -> Checkout:
    """The files of a release, of a dataset revision, or (neither) of the live revision and the champions.

    With a revision, and for a prompt without a champion, dvc.lock gets what the section index knows for this checkout's code and prompt
    file. Raises BadInputError for a release or revision that is not there, ConfigError for no such prompt. Writes nothing.
    """
    settings, store = workspaces.settings, workspaces.store
    if release is not None and revision is not None:
        raise ConfigError("name either a release or --data REVISION: a release brings its own data")
    if prompt:
        load_prompt(settings.prompts / f"{prompt}.yaml")  # a wrong name is told from an empty ledger
    names = [prompt] if prompt else list(load_prompts(settings.prompts))
    if release is not None:
        found = find(store, names, release)
        return _checkout(workspaces, found.lineage, [(found.prompt, found.release, found.lineage)])
    entries = Ledger(store, DATASET).entries()
    head = _revision(entries, revision)
    start = Rewritten.among(entries).current(workspaces.lineage(head.body["data"], head.n))
    parts: list[tuple[str, str | None, Lineage]] = []
    for name in names:
        now = champion(store, name) if revision is None else None
        if now:
            parts.append((name, now.release, now.lineage))
        elif head.body["rows"].get(name):
            parts.append((name, None, workspaces.known(load_prompt(settings.prompts / f"{name}.yaml"), start)))
    return _checkout(workspaces, start, parts)


def _revision(entries: list[Entry], n: int | None) -> Entry:
    if not entries:
        raise BadInputError("no dataset revision yet: land files, then run the DAG `ingest`")
    if n is None:
        return entries[-1]
    if not 0 <= n < len(entries):
        raise BadInputError(f"--data must be a dataset revision from 0 to {len(entries) - 1}, got {n}; see `retune ledger dataset`")
    return entries[n]


def _checkout(workspaces: Workspaces, data: Lineage, named: list[tuple[str, str | None, Lineage]]) -> Checkout:
    before = texts(workspaces.settings.project, [LOCK])[LOCK] or ""
    files = {DATA: data.data, LOCK: before}
    parts = []
    for prompt, release, lineage in named:
        files |= laid(files[LOCK], lineage, prompt, workspaces.prompt_file(lineage, prompt).decode()) | {DATA: data.data}
        parts.append(Part(prompt, release, lineage, workspaces.changed_code(lineage, prompt)))
    rewritten = Rewritten.of(workspaces.store)
    told = rewritten.told(data.revision)
    told += [s for part in parts if part.lineage.revision != data.revision for s in rewritten.told(part.lineage.revision, part.prompt)]
    return Checkout(data.revision, parts, files, told)


def laid(lock: str, lineage: Lineage, prompt: str, prompt_file: str) -> dict[str, str]:
    """Path -> text of a lineage's files; in `lock` the prompt's sections give way to the lineage's, those of other prompts stay."""
    mine = {name: section for name, section in sections(lineage.lock).items() if _belongs(name, prompt)}
    others = {name: section for name, section in sections(lock).items() if not _belongs(name, prompt) or name in mine}
    return {DATA: lineage.data, LOCK: lock_text({**others, **mine}), f"prompts/{prompt}.yaml": prompt_file}


def _belongs(section: str, prompt: str) -> bool:
    return section.partition("@")[2] == prompt


def uncommitted(project: Path, files: Mapping[str, str]) -> list[str]:
    """Those of the files that would change and hold what git does not have; without git, all that would change."""
    changing = [path for path, text in texts(project, files).items() if text is not None and text != files[path]]
    if not changing:
        return []
    status = ["git", "status", "--porcelain", "--", *changing]
    try:
        known = subprocess.run(status, cwd=project, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return changing
    return [path for path in changing if any(line[3:].endswith(path) for line in known.splitlines())]


def lay(workspaces: Workspaces, files: Mapping[str, str]) -> list[str]:
    """Writes the files that differ, tells the checkout's own DVC where the store is, and returns what was written.

    The store's place goes to .dvc/config.local, which git ignores. Raises StageError if DVC does not take it.
    """
    project = workspaces.settings.project
    written = [path for path, text in texts(project, files).items() if text != files[path]]
    for path in written:
        (project / path).write_bytes(files[path].encode())
    for command in remote_commands(workspaces):
        done = subprocess.run([sys.executable, "-m", *command], cwd=project, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StageError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return written


def remote_commands(workspaces: Workspaces) -> list[list[str]]:
    """The DVC commands by which a checkout finds the store."""
    return [["dvc", "remote", "modify", "--local", "store", name, value] for name, value in workspaces.remote_settings().items()]


def lineage_patch(workspaces: Workspaces, lineage: Lineage, prompt: str) -> str:
    """The git patch that turns the files of the recorded commit (without git: of the checkout) into the lineage's.

    It holds data.dvc and dvc.lock, and the prompt file where the run had overrides.
    """
    project = workspaces.settings.project
    before = {path: _at_commit(project, lineage.commit, path) for path in (DATA, LOCK, f"prompts/{prompt}.yaml")}
    return patch_text(before, laid(before[LOCK] or "", lineage, prompt, workspaces.prompt_file(lineage, prompt).decode()))


def patch_text(before: Mapping[str, str | None], after: Mapping[str, str]) -> str:
    """A patch that `git apply` takes, from texts by path to texts by path; None: no such file yet. Empty if nothing differs."""
    parts = []
    for path, new in after.items():
        old = before.get(path)
        if old == new:
            continue
        parts.append(f"diff --git a/{path} b/{path}\n{'new file mode 100644' + chr(10) if old is None else ''}")
        source = "/dev/null" if old is None else f"a/{path}"
        for line in difflib.unified_diff(_lines(old or ""), _lines(new), source, f"b/{path}"):
            parts.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(parts)


def _lines(text: str) -> list[str]:
    """Lines as git sees them: a line feed ends one, and nothing else does."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def texts(project: Path, paths: Iterable[str]) -> dict[str, str | None]:
    """The files as they stand in the checkout, None for one that is not there."""
    return {path: (project / path).read_bytes().decode() if (project / path).is_file() else None for path in paths}


def _at_commit(project: Path, commit: str, path: str) -> str | None:
    """A file's text at a commit; the checkout's where git does not know the commit. None if there is no such file."""
    try:
        subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=project, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return texts(project, [path])[path]
    shown = subprocess.run(["git", "show", f"{commit}:./{path}"], cwd=project, capture_output=True, check=False)
    return shown.stdout.decode() if shown.returncode == 0 else None
