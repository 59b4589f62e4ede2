"""data.dvc and dvc.lock in the repository are exactly what the examples make, so that `dvc pull` works after `make demo`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def test_the_committed_revision_is_the_examples(tmp_path: Path) -> None:
    command = [sys.executable, "examples/revision.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("data.dvc", "dvc.lock"):
        assert (tmp_path / name).read_text("utf-8") == (ROOT / name).read_text("utf-8"), f"run examples/revision.py: {name} is out of date"
