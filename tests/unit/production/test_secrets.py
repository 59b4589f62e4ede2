"""`make secrets`: what .env lacks, once, and readable by its owner alone."""

import base64
import stat
import subprocess
import sys
from pathlib import Path

from retune.production.secrets import SECRETS, add_missing

ROOT = Path(__file__).parents[3]


def values(path: Path) -> dict[str, str]:
    """As the last line of a name wins, for docker compose and for make."""
    return dict(line.split("=", 1) for line in path.read_text("utf-8").splitlines() if "=" in line and not line.startswith("#"))


def test_a_new_file_has_every_secret_and_is_private(tmp_path: Path) -> None:
    assert add_missing(tmp_path / ".env") == list(SECRETS)
    found = values(tmp_path / ".env")
    assert list(found) == list(SECRETS)
    assert len(set(found.values())) == len(SECRETS)
    assert min(map(len, found.values())) >= 20
    assert len(found["AIRFLOW_JWT_SECRET"].encode()) >= 64
    assert len(base64.urlsafe_b64decode(found["AIRFLOW_FERNET_KEY"])) == 32
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600


def test_what_is_there_stays_and_an_empty_value_is_none(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    kept = "REDIS_PASSWORD=chosen\nexport MLFLOW_ADMIN_PASSWORD='kept'"  # pragma: allowlist secret
    file.write_text(f"# mine\nRETUNE_STORE=s3://team/store\n{kept}\nPOSTGRES_PASSWORD=")
    file.chmod(0o644)
    before = file.read_text()
    added = add_missing(file)
    assert set(SECRETS) - set(added) == {"REDIS_PASSWORD", "MLFLOW_ADMIN_PASSWORD"}
    assert file.read_text().startswith(before + "\n")
    assert values(file)["REDIS_PASSWORD"] == "chosen"  # pragma: allowlist secret
    assert values(file)["POSTGRES_PASSWORD"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    after = file.read_text()
    assert add_missing(file) == []
    assert file.read_text() == after


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / ".env").symlink_to(tmp_path / "shared" / "env")
    add_missing(tmp_path / ".env")
    assert (tmp_path / ".env").is_symlink()
    assert set(values(tmp_path / "shared" / "env")) == set(SECRETS)


def test_nothing_has_to_be_installed(tmp_path: Path) -> None:
    """As `make secrets` calls it on a host that has Docker and Python: with the standard library alone."""
    alone = [sys.executable, "-S", "-m", "retune.production.secrets", str(tmp_path / ".env")]
    said = subprocess.run(alone, env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True).stdout
    assert "POSTGRES_PASSWORD" in said
    assert not any(value in said for value in values(tmp_path / ".env").values())
