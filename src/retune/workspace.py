"""Runs one DVC stage in a private workspace and passes lineage on. What is known of DVC's files stands in `retune.dvc_files`.

A stage is looked up in the store's section index first, by the hash of its command, dependencies and parameters. What is found there was
executed, pushed and read back before, so it is restored without starting DVC. What is not found runs as `dvc repro` in a temporary
folder, in a guarded process group, is pushed, read back, and only then enters the index.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from retune.child import run_child, terminated_as_exception
from retune.config import Prompt, resolved_yaml, sha256_json
from retune.dvc_files import EMPTY_DIR, REMOTE, entry, lay, outs, path_md5, safe, sections
from retune.errors import ConfigError, IntegrityError, RetuneError, StageError
from retune.machine import machine
from retune.objects import Objects
from retune.prompt_file import rewritten
from retune.records import Lineage
from retune.settings import Settings
from retune.stages import CHECKPOINT
from retune.store import Store, open_store

__all__ = ["STAGES", "StageRun", "Workspaces", "code_state"]

STAGES = ("preprocess", "tune", "evaluate")
"""The stages that a run goes through, in order; `resolve` before them is laid, never run."""

_DVC = """
import json, sys
from dvc.cli import main
for command in json.loads(sys.argv[1]):
    print("$ dvc " + " ".join(command), flush=True)
    if code := main(command):
        sys.exit(code)
"""
"""Runs DVC's commands one after the other in one process: half of what a command costs is DVC's start."""
_SCARCE = 16 << 20
"""Bytes left on a disk at which a failure is taken to come from it."""


@dataclass(frozen=True)
class StageRun:
    """What became of a stage."""

    lineage: Lineage
    key: str
    """Hash of command, dependencies and parameters."""
    restored: bool
    """True if no stage code ran."""
    seconds: float


def code_state(project: Path) -> tuple[str, bool]:
    """Commit of the checkout and whether it holds uncommitted changes; RETUNE_CODE_COMMIT names it where there is no git."""
    if commit := os.environ.get("RETUNE_CODE_COMMIT"):
        return commit, False
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return head, bool(changes.strip())


class Workspaces:
    """Private workspaces over one project, store and host cache."""

    def __init__(self, settings: Settings, log: Callable[[str], None] = print) -> None:
        self.settings = settings
        self.store: Store = open_store(settings.store, settings.s3_endpoint)
        self.log = log
        self.objects = Objects(self.store, settings.cache)
        self.files, self.read, self.fetch = self.objects.files, self.objects.read, self.objects.fetch

    # ---- lineage

    def lineage(self, data: str, revision: int, overrides: Mapping[str, Any] | None = None) -> Lineage:
        """The lineage of a run that starts from a dataset revision, before its first stage."""
        commit, dirty = code_state(self.settings.project)
        environment = _file_sha256(self.settings.project / "requirements.lock")
        return Lineage(data, "", dict(overrides or {}), commit, dirty, environment, revision)

    def section(self, lineage: Lineage, stage: str, prompt: str) -> dict[str, Any]:
        """The stage's section of the lineage's dvc.lock. Raises IntegrityError if the lineage has none."""
        found = sections(lineage.lock)
        name = f"{stage}@{prompt}"
        if name not in found:
            raise IntegrityError(f"lineage has no section {name!r}; it has {', '.join(found) or 'none'}")
        return found[name]

    def with_output(self, lineage: Lineage, prompt: Prompt, stage: str, outs: list[dict[str, Any]]) -> Lineage:
        """The lineage with `stage` replaced by a minimal section that has `outs`: an earlier release beside today's code."""
        command = self._stage(stage, prompt.name)["cmd"]
        return lay(lineage, f"{stage}@{prompt.name}", {"cmd": command, "outs": outs})

    # ---- stages

    def run(self, stage: str, prompt: Prompt, lineage: Lineage, environment: Mapping[str, str] | None = None) -> StageRun:
        """Reproduces one stage and returns the lineage that includes it.

        `prompt` is resolved: its fields are the parameters that count. `environment` is handed to the stage's process.
        Raises StageError if the stage failed (its output is in the log), IntegrityError if what was pushed does not read back.
        Retry: safe at any point; a finished stage is restored, tuning goes on from its last checkpoint, on whatever host.
        """
        start = time.monotonic()
        name = f"{stage}@{prompt.name}"
        key = self._key(stage, prompt, lineage)
        lineage = self._resolve(prompt, lineage)
        index = _index(stage, prompt, key)
        if self.store.exists(index):
            known = json.loads(self.store.get(index))
            laid = _with(lineage, stage, prompt.name, known)
            if missing := self._missing(laid, stage, prompt.name):
                self.log(f"{name}: {len(missing)} recorded object(s) are gone from the store ({missing[0]}, ...): running it again")
            else:
                self.log(f"{name}: restored by key {key[:12]}, nothing executed")
                return StageRun(laid, key, True, time.monotonic() - start)
        inputs = [path for path in self._stage(stage, prompt.name)["deps"] if not self._is_code(path)]
        self._check_cache(lineage, *inputs)
        with self._workspace(lineage, prompt, stage) as folder:
            with self._checkpoints(folder, stage, prompt, key) as (more, on_line):
                commands = ["repro", "--pull", "--no-run-cache", "-s", name], ["push", "-q", name]
                begun = time.monotonic()
                try:
                    self._dvc(folder, *commands, environment={**(environment or {}), **more}, on_line=on_line)
                except StageError as error:
                    if "Checkout failed" in str(error):  # DVC does not say which object of the store is damaged
                        for md5 in (md5 for path in inputs for md5 in self.files(lineage, path).values()):
                            self.objects.get(md5)
                    # It trusts a listing that its cache has, and fails where it cannot read it.
                    lock = folder / "dvc.lock"
                    section = sections(lock.read_text("utf-8")).get(name, {}) if lock.is_file() else {}
                    self._check_outputs(name, [out["md5"] for out in section.get("outs", ())])
                    raise
            executed = {**machine(), "seconds": round(time.monotonic() - begun, 2)}
            known = {"section": sections((folder / "dvc.lock").read_text("utf-8"))[name], "machine": executed}
            laid = _with(lineage, stage, prompt.name, known)
            made = list(self._stage_objects(laid, stage, prompt.name))
            self._check_outputs(name, made)
            for md5 in made:
                self.objects.verify(md5)
            if self._key(stage, prompt, lineage) != key:
                raise StageError(f"the code or files that {name} depends on changed while it ran; run it again")
            self.store.put(index, json.dumps(known).encode())
        return StageRun(laid, key, False, time.monotonic() - start)

    def _check_outputs(self, name: str, made: Iterable[str]) -> None:
        """Raises StageError if the host's cache holds other bytes under the name of what a stage made; they are removed."""
        if damaged := self.objects.drop_damaged(made):
            raise StageError(f"this host's cache held a damaged copy of {damaged[0]}, which {name} made again; it is removed: run it again")

    def execute(self, prompt: Prompt, lineage: Lineage, environment: Mapping[str, str]) -> Lineage:
        """Preprocesses and tunes from the lineage's data, whatever was done before; returns the lineage that this makes.

        Nothing is restored, pushed or indexed: its files are in the host's cache alone. Raises as `run` does.
        """
        stages = STAGES[:2]
        names = [f"{stage}@{prompt.name}" for stage in stages]
        with self._workspace(replace(lineage, lock=""), prompt, *stages) as folder:
            self._dvc(folder, *(["repro", "--pull", "--no-run-cache", "-s", name] for name in names), environment=environment)
            made = sections((folder / "dvc.lock").read_text("utf-8"))
        for stage, name in zip(stages, names, strict=True):
            lineage = _with(lineage, stage, prompt.name, {"section": made[name], "machine": machine({**os.environ, **environment})})
        return lineage

    def known(self, prompt: Prompt, lineage: Lineage) -> Lineage:
        """The lineage with every stage that the section index knows, up to the first that would have to run. Runs nothing."""
        lineage = self._resolve(prompt, lineage)
        for stage in STAGES:
            index = _index(stage, prompt, self._key(stage, prompt, lineage))
            if not self.store.exists(index):
                break
            laid = _with(lineage, stage, prompt.name, json.loads(self.store.get(index)))
            if self._missing(laid, stage, prompt.name):
                break
            lineage = laid
        return lineage

    def prompt_file(self, lineage: Lineage, prompt: str) -> bytes:
        """The prompt file that the lineage's parameters follow from, as it was written, with the run's overrides."""
        return self.objects.get(self._dependencies(lineage, "resolve", prompt)[f"prompts/{prompt}.yaml"])

    def changed_code(self, lineage: Lineage, prompt: str) -> list[str]:
        """Files and folders of the project that are not what the lineage's stages ran with; empty if all are."""
        stages = [name.partition("@")[0] for name in sections(lineage.lock) if name.endswith(f"@{prompt}")]
        recorded = {item for stage in stages for item in self._dependencies(lineage, stage, prompt).items()}
        code = [(path, md5) for path, md5 in recorded if self._is_code(path) and not path.startswith("prompts/")]
        project = self.settings.project
        return sorted({path for path, md5 in code if not (project / path).exists() or path_md5(project / path) != md5})

    def remote_settings(self) -> dict[str, str]:
        """What DVC must know of the store's remote, credentials apart: those come from the environment."""
        found = {"url": f"{self.settings.store}/{REMOTE}"}
        if self.settings.store.startswith("s3://"):
            found["region"] = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or "us-east-1"
            if self.settings.s3_endpoint:
                found["endpointurl"] = self.settings.s3_endpoint
        return found

    def add_data(self, data: str, add: Mapping[str, Path], remove: tuple[str, ...] = ()) -> str:
        """The data.dvc text after adding and removing files under `data/`, pushed and read back.

        `add` maps paths relative to `data/` to local files. Files that stay are not pulled.
        """
        lineage = Lineage(data, "", {}, "", False, "")
        if remove:
            stay = {name: md5 for name, md5 in self.files(lineage, "data").items() if name not in set(remove)}
            out = {"md5": self.objects.keep_listing(stay), "nfiles": len(stay), "hash": "md5", "path": "data"}
            data = yaml.safe_dump({"outs": [out]}, sort_keys=False)
        self._check_cache(replace(lineage, data=data))
        with self._workspace(replace(lineage, data=data)) as folder:
            for name, path in add.items():
                place = folder / "data" / safe(name)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
            added = [["add", "-q", *(f"data/{name}" for name in add)]] if add else []
            self._dvc(folder, *added, ["push", "-q", "data.dvc"])
            data = (folder / "data.dvc").read_text("utf-8")
        lineage = replace(lineage, data=data)
        files = self.files(lineage, "data")
        for name in add:
            self.objects.verify(files[name])
        return data

    def data_hash(self, lineage: Lineage, prompt: str) -> str:
        """sha256 over the names and hashes of `data/<prompt>`, whatever else the revision holds."""
        return sha256_json(sorted(self.files(lineage, f"data/{prompt}").items()))

    def code_hash(self, prompt: Prompt) -> str:
        """sha256 over the code and lock file that the prompt's stages depend on."""
        return sha256_json({s: {d: self._project_hash(d) for d in self._stage(s, prompt.name)["deps"] if self._is_code(d)} for s in STAGES})

    # ---- inside

    def _check_cache(self, lineage: Lineage, *paths: str) -> None:
        """Takes damaged listings and damaged files under these paths out of the host's cache before DVC uses them; it fetches them anew."""
        self.objects.drop_damaged([out["md5"] for out in outs(lineage) if out["md5"].endswith(".dir")])
        if damaged := self.objects.drop_damaged([md5 for path in paths for md5 in self.files(lineage, path).values()]):
            self.log(f"{len(damaged)} damaged object(s) removed from this host's cache ({damaged[0]}, ...)")

    def _dependencies(self, lineage: Lineage, stage: str, prompt: str) -> dict[str, str]:
        """Path -> md5 of what a stage ran with, by its section. Empty for a section that names an output alone."""
        return {dep["path"]: dep["md5"] for dep in self.section(lineage, stage, prompt).get("deps", []) if "md5" in dep}

    def _stage(self, stage: str, prompt: str) -> dict[str, Any]:
        """The stage's definition in dvc.yaml with the prompt's name in place."""
        text = (self.settings.project / "dvc.yaml").read_text("utf-8").replace("${item}", prompt)
        stages = yaml.safe_load(text)["stages"]
        if stage not in stages:
            raise ConfigError(f"dvc.yaml has no stage {stage!r}; it has {', '.join(stages)}")
        definition: dict[str, Any] = stages[stage]["do"]
        return definition

    @staticmethod
    def _is_code(path: str) -> bool:
        return not path.startswith(("data/", "artifacts/"))

    def _project_hash(self, path: str) -> str:
        place = self.settings.project / path
        if place.is_file():
            return _file_sha256(place)
        if not place.is_dir():
            raise ConfigError(f"dvc.yaml depends on {path}, which is not in {self.settings.project}")
        files = sorted(p for p in place.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return sha256_json({p.relative_to(place).as_posix(): _file_sha256(p) for p in files})

    def _key(self, stage: str, prompt: Prompt, lineage: Lineage) -> str:
        definition = self._stage(stage, prompt.name)
        dependencies = {
            path: self._project_hash(path) if self._is_code(path) else sha256_json(sorted(self.files(lineage, path).items()))
            for path in definition["deps"]
        }
        fields = prompt.model_dump(mode="json")
        parameters = {field: fields[field] for entry in definition["params"] for names in entry.values() for field in names}
        outputs = [definition.get(kind, []) for kind in ("outs", "metrics", "plots")]
        return sha256_json({"cmd": definition["cmd"], "deps": dependencies, "params": parameters, "outs": outputs})

    def _resolve(self, prompt: Prompt, lineage: Lineage) -> Lineage:
        """The lineage with the section that stage resolve would leave by hand, its files in the store: DVC need not run for it.

        The prompt file is the project's, with the run's overrides written into it.
        """
        definition = self._stage("resolve", prompt.name)
        place = self.settings.prompts / f"{prompt.name}.yaml"
        resolved = resolved_yaml(prompt).encode()
        written = rewritten(place.read_bytes().decode(), prompt).encode() if place.is_file() else resolved
        deps = {path: self.settings.project / path for path in definition["deps"]}
        contents = {path: written if path.startswith("prompts/") else file.read_bytes() for path, file in deps.items()}
        section = {
            "cmd": definition["cmd"],
            "deps": [entry(path, content) for path, content in contents.items()],
            "outs": [entry(definition["outs"][0], resolved)],
        }
        if sections(lineage.lock).get(f"resolve@{prompt.name}") == section:
            return lineage
        for content in (written, resolved):
            self.objects.put(content)
        # The run's first ledger entry may be weeks away, behind tuning and a person's approval: till then this names them.
        self.store.put(_index("resolve", prompt, sha256_json(section)), json.dumps({"section": section, "machine": {}}).encode())
        return lay(lineage, f"resolve@{prompt.name}", section)

    def _stage_objects(self, lineage: Lineage, stage: str, prompt: str) -> Iterator[str]:
        """md5 of every object that the stage's outputs consist of."""
        for out in self.section(lineage, stage, prompt).get("outs", []):
            yield out["md5"]
            if out["md5"].endswith(".dir"):
                yield from self.files(lineage, out["path"]).values()

    def _missing(self, lineage: Lineage, stage: str, prompt: str) -> list[str]:
        """Objects of a stage that are gone from the store. A folder whose listing is gone cannot be looked into."""
        outs = [out["md5"] for out in self.section(lineage, stage, prompt).get("outs", [])]
        return self.objects.missing(outs) or self.objects.missing(self._stage_objects(lineage, stage, prompt))

    @contextmanager
    def _workspace(self, lineage: Lineage, prompt: Prompt | None = None, *stages: str) -> Iterator[Path]:
        """A temporary folder with the project's definition and the lineage laid in it; removed at the end, whatever happens."""
        project = self.settings.project
        with terminated_as_exception(), tempfile.TemporaryDirectory(prefix="retune-workspace-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            (folder / ".dvc").mkdir()
            (folder / ".dvc/config").write_text(self._dvc_config(), "utf-8")
            shutil.copyfile(project / ".dvcignore", folder / ".dvcignore")
            (folder / "data.dvc").write_text(lineage.data, "utf-8")
            if EMPTY_DIR in lineage.data:
                self.objects.keep_listing({})
            if prompt is not None:
                self._lay_project(folder, prompt, stages)
                if lineage.lock:
                    (folder / "dvc.lock").write_text(lineage.lock, "utf-8")
            yield folder

    @contextmanager
    def _checkpoints(self, folder: Path, stage: str, prompt: Prompt, key: str) -> Iterator[tuple[dict[str, str], Callable[[str], None]]]:
        """Hands stage tune the checkpoint of an earlier try with the same key, and puts what it saves into the store.

        Gives (environment for the stage, what to call with each line of its output). A store that is away stops no tuning.
        """
        if stage != "tune":
            yield {}, self.log
            return
        file, place = folder / "checkpoint", f"checkpoints/{prompt.name}/{key}"
        if self.store.exists(place):
            file.write_bytes(self.store.get(place))
        known = file.stat().st_mtime_ns if file.is_file() else 0

        def keep() -> None:
            nonlocal known
            if not file.is_file() or (now := file.stat().st_mtime_ns) == known:
                return
            try:
                self.store.put(place, file.read_bytes())
                known = now
            except RetuneError as error:
                self.log(f"the checkpoint was not stored ({error}); tuning goes on")

        def on_line(line: str) -> None:
            if line.startswith(CHECKPOINT):
                keep()
                line = f"checkpoint of step {line.removeprefix(CHECKPOINT)} saved"
            self.log(line)

        try:
            yield {"RETUNE_CHECKPOINT": str(file)}, on_line
        except BaseException:
            keep()  # what a stage saved on its way out, when nobody read its lines any more
            raise
        if self.store.exists(place):
            self.store.put(place, b"")  # the stage's outputs hold what it led to

    def _lay_project(self, folder: Path, prompt: Prompt, stages: Sequence[str]) -> None:
        project = self.settings.project
        shutil.copyfile(project / "dvc.yaml", folder / "dvc.yaml")
        (folder / "params.yaml").write_text(yaml.safe_dump({"prompts": [prompt.name]}), "utf-8")
        (folder / f"artifacts/{prompt.name}").mkdir(parents=True)
        (folder / f"artifacts/{prompt.name}/prompt.yaml").write_text(resolved_yaml(prompt), "utf-8")
        for path in filter(self._is_code, [path for stage in stages for path in self._stage(stage, prompt.name)["deps"]]):
            source, target = project / path, folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
        models = [model.path for model in (prompt.base_model, prompt.evaluate.encoder) if model is not None and model.path]
        for reference in {*models, *(found.path for found in prompt.evaluate.test_sets.values())}:
            if not PurePosixPath(reference).is_absolute():
                link = folder / safe(reference)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(project / reference)

    def _dvc_config(self) -> str:
        self.settings.cache.mkdir(parents=True, exist_ok=True)
        lines = ["[core]", "no_scm = true", "analytics = false", "check_update = false", "remote = store"]
        lines += ["[cache]", f"dir = {self.settings.cache}"]
        lines += ["['remote \"store\"']", "verify = true", *(f"{name} = {value}" for name, value in self.remote_settings().items())]
        return "\n".join(lines) + "\n"

    def _dvc(
        self,
        folder: Path,
        *commands: list[str],
        environment: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        """DVC commands in a workspace, their output streaming into the log. Raises StageError with the last lines of one that fails."""
        child = {**(environment or {}), "PYTHONPATH": str(folder / "src"), "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}
        child["DVC_SITE_CACHE_DIR"] = str(folder / ".dvc/site-cache")  # private, as the workspace is
        try:
            run_child("dvc", [sys.executable, "-c", _DVC, json.dumps(commands)], folder, child, on_line or self.log)
        except StageError as error:
            free = {place: shutil.disk_usage(place).free for place in (folder.parent, self.settings.cache)}
            place = min(free, key=lambda one: free[one])
            if free[place] < _SCARCE:  # DVC does not always say so
                raise StageError(
                    f"{error}\nThe disk is full: {place} has {free[place] >> 10} kB left; make room, then run again"
                ) from error
            raise


def _with(lineage: Lineage, stage: str, prompt: str, known: Mapping[str, Any]) -> Lineage:
    """The lineage with what the section index knows of a stage."""
    return replace(lay(lineage, f"{stage}@{prompt}", known["section"]), machines={**lineage.machines, stage: known["machine"]})


def _index(stage: str, prompt: Prompt, key: str) -> str:
    return f"sections/{prompt.name}/{stage}/{key}.json"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
