"""`make scan-secrets` finds what it is for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = {
    "aws.env": "AWS_ACCESS_KEY_ID=" + "AKIA" + "QWERTYUIOPASDFGH",
    "database.env": "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=postgresql://airflow:" + "h7Gk2pQz9" + "@db/airflow",
    "key.pem": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "settings.py": "password = '" + "h7Gk2pQz9" + "'",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_secret_is_found(tmp_path: Path, name: str) -> None:
    pytest.importorskip("detect_secrets", reason="detect-secrets is absent: make install-dev")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shutil.copy(ROOT / ".secrets.baseline", tmp_path)
    (tmp_path / name).write_text(PLANTED[name] + "\n")
    command = [sys.executable, "-m", "detect_secrets.pre_commit_hook", "--baseline", ".secrets.baseline", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, f"Location:    {name}:1" in done.stdout) == (1, True), done.stdout + done.stderr


def test_nothing_is_let_pass_but_by_a_word_in_its_own_line() -> None:
    assert json.loads((ROOT / ".secrets.baseline").read_text())["results"] == {}
