"""Makes a recorded release again: verifies its lineage, executes preprocess and tune from it, and compares every file's hash.

Nothing is restored, and nothing is written to the store. The files are byte-identical on like processor, threads and environment, and
within TOLERANCE elsewhere.
"""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from retune.config import Prompt, parse_yaml
from retune.dvc_files import listing, md5_of
from retune.errors import BadInputError, IntegrityError
from retune.inference.release import Release, read_release
from retune.recorded import Recorded
from retune.records import Lineage
from retune.settings import Settings
from retune.tolerance import TOLERANCE, Differences, curve_difference, other_machine, other_versions, tensor_difference, within
from retune.workspace import Workspaces

__all__ = ["FileHashes", "Reproduction", "reproduce"]


@dataclass(frozen=True)
class FileHashes:
    path: str
    recorded: str | None
    """md5; None if the file was not recorded."""
    rebuilt: str | None
    """md5; None if the file was not made again."""

    @property
    def equal(self) -> bool:
        return self.recorded == self.rebuilt


@dataclass(frozen=True)
class Reproduction:
    recorded: Recorded
    release: str
    """Id of the release that was made now."""
    files: list[FileHashes]
    unlike: list[str]
    """What is unlike here and where the release was tuned, a sentence each."""
    differences: Differences | None
    """None if all files are equal."""

    @property
    def within_tolerance(self) -> bool:
        return self.differences is None or within(self.differences)

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.recorded.prompt,
            "release": self.recorded.release,
            "ledger_entry": self.recorded.entry,
            "rebuilt": self.release,
            "equal": self.differences is None,
            "within_tolerance": self.within_tolerance,
            "tolerance": TOLERANCE,
            "differences": self.differences,
            "unlike": self.unlike,
            "files": [{"path": f.path, "recorded": f.recorded, "rebuilt": f.rebuilt, "equal": f.equal} for f in self.files],
        }


def reproduce(
    settings: Settings,
    recorded: Recorded,
    keep: Path | None = None,
    log: Callable[[str], None] = print,
    environ: Mapping[str, str] = os.environ,
) -> Reproduction:
    """Executes preprocess and tune of a recorded release again. keep: a folder, not there yet, that gets the release made now.

    The threads are RETUNE_THREADS where it is set, else as many as are recorded. Raises IntegrityError for a lineage that does not
    hold, BadInputError where the recorded code cannot be had or rows of its data were forgotten, StageError if a stage fails. Retry: safe.
    """
    if keep is not None and keep.exists():
        raise BadInputError(f"--keep must name a folder that does not exist yet, got {keep}")
    if recorded.rewritten:
        raise BadInputError(
            f"release {recorded.release[:12]} of {recorded.prompt} cannot be made again as it was: {'; '.join(recorded.rewritten)}. "
            f"`retune run {recorded.prompt}` tunes one on what is left"
        )
    name, lineage = recorded.prompt, recorded.lineage
    with tempfile.TemporaryDirectory(prefix="retune-reproduce-", ignore_cleanup_errors=True) as temporary:
        scratch = Path(temporary)
        store = Workspaces(replace(settings, cache=scratch / "empty"), log)  # what is recorded is read from the store alone
        old = _outputs(store, lineage, name, scratch / "recorded", recorded.release)
        prompt = _verified_prompt(store, lineage, name, scratch / "data")
        project = _code(settings, lineage, name, scratch / "code", log)
        environment = {"RETUNE_BASE_MODELS": os.pathsep.join(map(str, settings.base_models)), **_threads(lineage, environ)}
        here = Workspaces(replace(settings, project=project, cache=scratch / "cache"), log)
        rebuilt = here.execute(prompt, lineage, environment)
        new = _outputs(here, rebuilt, name, scratch / "rebuilt")
        files = _compare(store, lineage, here, rebuilt, name)
        differences = None if all(file.equal for file in files) else _differences(old, new)
        unlike = other_machine(lineage.machines.get("tune", {}), rebuilt.machines["tune"])
        unlike += other_versions((project / "requirements.lock").read_text("utf-8"), _installed)
        if keep is not None:
            shutil.copytree(new.folder, keep)
    return Reproduction(recorded, new.id, files, unlike, differences)


def _threads(lineage: Lineage, environ: Mapping[str, str]) -> dict[str, str]:
    threads = environ.get("RETUNE_THREADS") or lineage.machines.get("tune", {}).get("threads")
    return {"RETUNE_THREADS": str(threads)} if threads else {}


def _places(name: str) -> list[str]:
    return [f"artifacts/{name}/{part}" for part in ("dataset", "release", "curve.csv")]


def _outputs(workspaces: Workspaces, lineage: Lineage, name: str, folder: Path, release: str | None = None) -> Release:
    """Dataset, release and curve under `folder`, every byte verified; the release must have the id `release`, if given."""
    for place in _places(name):
        workspaces.fetch(lineage, place, folder / Path(place).name)
    return read_release(folder / "release", release)


def _verified_prompt(store: Workspaces, lineage: Lineage, name: str, scratch: Path) -> Prompt:
    """The resolved prompt, once the sections are known to follow from the data and from each other.

    Raises IntegrityError naming the first thing that does not fit.
    """
    store.fetch(lineage, f"data/{name}", scratch)
    place = f"artifacts/{name}/prompt.yaml"
    raw = parse_yaml(store.read(lineage, place), place)
    for stage in ("preprocess", "tune"):
        section = store.section(lineage, stage, name)
        for dep in section["deps"]:
            if dep["path"].startswith(("data/", "artifacts/")):
                files = store.files(lineage, dep["path"])
                _check(f"{stage}@{name}: {dep['path']}", dep["md5"], files.get("") or md5_of(listing(files)) + ".dir")
        for field, value in section["params"][f"artifacts/{name}/prompt.yaml"].items():
            _check(f"{stage}@{name}: parameter {field}", value, raw.get(field))
    return Prompt.model_validate(raw)


def _check(what: str, recorded: object, found: object) -> None:
    if recorded != found:
        raise IntegrityError(f"the lineage was changed: {what} is recorded as {recorded!r}, but it holds {found!r}")


def _code(settings: Settings, lineage: Lineage, name: str, folder: Path, log: Callable[[str], None]) -> Path:
    """A folder with the code that the stages ran with: the recorded commit's, or the checkout's where its hashes are the same."""
    commit = lineage.commit[:12]
    archive = _archive(settings.project, lineage.commit, folder)
    places = [settings.project] if archive is None else [settings.project, archive] if lineage.dirty else [archive]
    for place in places:
        changed = Workspaces(replace(settings, project=place)).changed_code(lineage, name)
        if not changed:
            log(f"code: {f'commit {commit}' if place == archive else 'the checkout, which holds the recorded files'}")
            found = hashlib.sha256((place / "requirements.lock").read_bytes()).hexdigest()
            _check("environment, the sha256 of requirements.lock,", lineage.environment, found)
            return place
    differing = ", ".join(changed)
    if archive is not None and not lineage.dirty:
        raise IntegrityError(f"the lineage was changed: its dvc.lock names other code than its commit {commit} holds: {differing}")
    why = f"commit {commit} held uncommitted changes then" if lineage.dirty else f"git does not know commit {commit} here"
    raise BadInputError(f"{why}, and the checkout has other code: {differing}; check out what the release was tuned with and try again")


def _archive(project: Path, commit: str, folder: Path) -> Path | None:
    """The files of a commit; None without git or the commit."""
    try:
        tar = subprocess.run(["git", "archive", "--format=tar", commit], cwd=project, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _compare(store: Workspaces, lineage: Lineage, here: Workspaces, rebuilt: Lineage, name: str) -> list[FileHashes]:
    found = []
    for place in _places(name):
        before, after = store.files(lineage, place), here.files(rebuilt, place)
        found += [FileHashes(f"{place}/{file}".rstrip("/"), before.get(file), after.get(file)) for file in sorted({*before, *after})]
    return found


def _differences(old: Release, new: Release) -> Differences:
    """What an unlike machine may change is measured; the rows of the splits are what it may not."""
    before, after = old.folder.parent, new.folder.parent
    splits = [f"dataset/{split}.parquet" for split in ("train", "validation", "test")]
    unequal = [not pd.read_parquet(before / split).equals(pd.read_parquet(after / split)) for split in splits]
    curves = curve_difference(pd.read_csv(before / "curve.csv"), pd.read_csv(after / "curve.csv"))
    return {"splits_with_other_rows": float(sum(unequal)), **tensor_difference(old.tensors, new.tensors), **curves}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
