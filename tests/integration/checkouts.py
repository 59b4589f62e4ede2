"""Checkouts of their own, in which tests run the project as its users do."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECRETS = {
    "key": "AKIA" + "QWERTYUIOPASDFGH",
    "secret": "wJalrXUt" + "nFEMI7MDENG",  # pragma: allowlist secret
    "password": "hunter2" + "aQ9x",  # pragma: allowlist secret
    "token": "tok" + "en8Zk2mW",
}
PLANTED = {
    "AWS_ACCESS_KEY_ID": SECRETS["key"],
    "AWS_SECRET_ACCESS_KEY": SECRETS["secret"],
    "AWS_SESSION_TOKEN": SECRETS["token"],
    "AIRFLOW_CONN_WAREHOUSE": f"postgresql://airflow:{SECRETS['password']}@database/warehouse",
    "RETUNE_NOTIFY_URL": f"http://127.0.0.1:9/hook?token={SECRETS['token']}",
}
"""Environment with secrets, in which the demo runs."""


def copy_project(target: Path) -> Path:
    """The files that git tracks or would track, as they are in the working tree, as a checkout of their own."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    identity = ["-c", "user.name=Retune tests", "-c", "user.email=tests@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=target, check=True)
    return target


@contextmanager
def environment_of(folder: Path) -> Iterator[None]:
    """The environment of this process and of those it starts points at a checkout, whose code is what runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("RETUNE_", "MLFLOW_", "AIRFLOW", "AWS_")) and n != "RETUNE_ALL_TIERS"]:
            patch.delenv(name)
        patch.setenv("RETUNE_PROJECT", str(folder))
        patch.setenv("PYTHONPATH", str(folder / "src"))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


def run(project: Path, *command: str, timeout: float = 900, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
    """A module of the environment as a command, in a checkout."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=project, env={**os.environ, **extra}, capture_output=True, text=True, timeout=timeout
    )
    if check:
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done


@dataclass(frozen=True)
class Demonstrated:
    """A checkout in which `make demo` has run from nothing, and what it printed."""

    project: Path
    output: str
