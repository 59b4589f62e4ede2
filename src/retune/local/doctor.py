"""`retune doctor`: each check says what it found, and what to do if that is not right."""

import contextlib
import secrets
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from retune.config import load_prompts
from retune.errors import RetuneError
from retune.local.http import answers
from retune.local.ports import is_free
from retune.local.record import held, marked, running
from retune.settings import Settings, without_password

__all__ = ["Check", "examine"]

State = Literal["ok", "warn", "fail"]
PACKAGES = ("apache-airflow", "mlflow", "dvc", "torch", "transformers", "peft")
SPACE = 5 * 2**30
"""Bytes of free disk below which a warning is due."""


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    finding: str
    way_out: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> list[Check]:
    """Every check, whatever the others find."""
    checks: list[Callable[[Settings], list[Check]]] = [
        _versions,
        _disk,
        _git,
        _store,
        _prompts,
        _dvc,
        _stack,
    ]
    found = []
    for check in checks:
        try:
            found += check(settings)
        except Exception as error:  # noqa: BLE001 - a check that cannot be made is a finding, not the end of the others
            found.append(Check(check.__name__.strip("_"), "fail", f"could not be checked: {type(error).__name__}: {error}"))
    return found


def _versions(settings: Settings) -> list[Check]:
    pinned = {}
    with contextlib.suppress(OSError, KeyError):
        listed = tomllib.loads((settings.project / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
        pinned = dict(item.split("==") for item in listed if "==" in item)
    found = [f"python {sys.version.split()[0]}"]
    wrong = []
    for name in PACKAGES:
        try:
            have = version(name)
        except PackageNotFoundError:
            have = "missing"
        found.append(f"{name} {have}")
        if have == "missing" or have != pinned.get(name, have):
            wrong.append(f"{name} {have}, wanted {pinned.get(name, 'any')}")
    if wrong:
        return [Check("versions", "fail", "; ".join(wrong), "run `make install`")]
    return [Check("versions", "ok", ", ".join(found))]


def _disk(settings: Settings) -> list[Check]:
    place = next(folder for folder in (settings.home, *settings.home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    finding = f"{free / 2**30:.1f} GiB free at {place}"
    if free < SPACE:
        return [Check("disk", "warn", finding, "free some: `dvc gc` for the cache, old runs in MLflow")]
    return [Check("disk", "ok", finding)]


def _git(settings: Settings) -> list[Check]:
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain"])
    try:
        commit, changed = (
            subprocess.run(c, cwd=settings.project, check=True, capture_output=True, text=True).stdout.strip() for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return [Check("git", "warn", "no commit here: releases cannot name the code they came from", "`git init`, then commit")]
    if changed:
        state: State = "fail" if settings.require_clean else "warn"
        return [
            Check(
                "git",
                state,
                f"commit {commit}, {len(changed.splitlines())} file(s) changed since",
                "commit them; releases are marked dirty",
            )
        ]
    return [Check("git", "ok", f"commit {commit}, nothing changed")]


def _store(settings: Settings) -> list[Check]:
    from retune.store import open_store

    key, words = f"doctor/{socket.gethostname()}", secrets.token_bytes(16)
    try:
        store = open_store(settings.store, settings.s3_endpoint)
        store.put(key, words)
        if store.get(key) != words:
            return [Check("store", "fail", f"{settings.store} does not return what was written", "use a store that reads its own writes")]
    except RetuneError as error:
        return [Check("store", "fail", str(error), "check RETUNE_STORE, AWS_ENDPOINT_URL_S3 and the credentials in the environment")]
    return [Check("store", "ok", f"{settings.store} can be written and read back")]


def _prompts(settings: Settings) -> list[Check]:
    try:
        prompts = load_prompts(settings.prompts)
    except RetuneError as error:
        return [Check("prompts", "fail", str(error), "mend the file")]
    if not prompts:
        return [Check("prompts", "warn", f"no prompt file in {settings.prompts}", "copy one of the examples")]
    found = [Check("prompts", "ok", f"{len(prompts)} prompt file(s): {', '.join(prompts)}")]
    from retune.inference.base_model import folder_sha256

    for name, prompt in prompts.items():
        model = prompt.base_model
        if model.path is None:
            found.append(Check(f"base model of {name}", "ok", f"{model.hub} at {model.revision}, from the hub"))
            continue
        folder = settings.project / model.path
        if not folder.is_dir():
            found.append(
                Check(f"base model of {name}", "fail", f"no folder {folder}", "`make base-model`, or set base_model in the prompt file")
            )
        elif (have := folder_sha256(folder)) != model.sha256:
            text = f"{folder} has sha256 {have}, the prompt file says {model.sha256}"
            found.append(Check(f"base model of {name}", "fail", text, "restore the folder, or accept the other model in the prompt file"))
        else:
            found.append(Check(f"base model of {name}", "ok", f"{folder}, sha256 {have[:12]}... as the prompt file says"))
    return found


def _dvc(settings: Settings) -> list[Check]:
    missing = [name for name in ("dvc.yaml", "params.yaml", ".dvc/config", "requirements.lock") if not (settings.project / name).exists()]
    if missing:
        return [Check("dvc", "fail", f"{', '.join(missing)} missing in {settings.project}", "`git checkout` them")]
    return [Check("dvc", "ok", "dvc.yaml, params.yaml, .dvc/config, requirements.lock are there")]


def _stack(settings: Settings) -> list[Check]:
    stack = running(settings)
    if stack is None:
        if held(settings):
            return [Check("stack", "warn", "is starting or stopping", "wait, then look again")]
        if left := marked(settings):
            pids = ", ".join(str(p.pid) for p in left)
            return [Check("stack", "warn", f"not running, but processes of it are: {pids}", "`retune down` ends them")]
        taken = [str(port) for port in (8080, 5000) if not is_free(port)]
        others = f"; port {', '.join(taken)} is taken, so others will be used" if taken else ""
        return [Check("stack", "ok", f"not running{others}")]
    found = []
    for name, url in (("airflow", f"{stack.airflow_url}/api/v2/monitor/health"), ("mlflow", f"{stack.mlflow_url}/health")):
        good = answers(url)
        found.append(
            Check(
                name,
                "ok" if good else "fail",
                f"{without_password(url)} {'answers' if good else 'does not answer'}",
                "" if good else "`retune down`, `retune up`",
            )
        )
    for name, component in stack.components.items():
        if component["state"] != "running" or component["restarts"]:
            state: State = "fail" if component["state"] == "failed" else "warn"
            text = f"{component['state']}, restarted {component['restarts']} time(s)"
            found.append(Check(name, state, text, f"read {component['log']}; `retune down` and `retune up` start anew"))
    from retune.local.airflow_api import Airflow

    errors = Airflow(stack.airflow_url, stack.user, stack.password).import_errors()
    found += [
        Check("dags", "fail", f"{file} cannot be imported: {text}", "mend the file; Airflow reads it again within 30 s")
        for file, text in errors
    ]
    return found or [Check("stack", "ok", "running")]
