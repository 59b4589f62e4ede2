"""Fixtures of the tests that start real processes."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout of its own whose code is what runs; the environment of the tests' processes points at it."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("RETUNE_", "MLFLOW_", "AIRFLOW", "AWS_")) and n != "RETUNE_ALL_TIERS"]:
            patch.delenv(name)
        patch.setenv("RETUNE_PROJECT", str(folder))
        patch.setenv("PYTHONPATH", str(folder / "src"))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield folder
