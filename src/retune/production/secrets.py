"""The secrets of docker-compose.yml: `make secrets` writes those into .env that it lacks. Needs nothing but Python."""

import base64
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["SECRETS", "add_missing"]


def _password() -> str:
    """Hexadecimal digits: they go through URLs, command lines, .env files and make as they are."""
    return secrets.token_hex(24)


SECRETS: dict[str, Callable[[], str]] = {
    "POSTGRES_PASSWORD": _password,
    "AIRFLOW_DB_PASSWORD": _password,
    "CELERY_DB_PASSWORD": _password,
    "MLFLOW_DB_PASSWORD": _password,
    "REDIS_PASSWORD": _password,
    "OBJECT_STORE_ACCESS_KEY": lambda: secrets.token_hex(10),
    "OBJECT_STORE_SECRET_KEY": _password,
    "AIRFLOW_FERNET_KEY": lambda: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
    "AIRFLOW_JWT_SECRET": lambda: secrets.token_hex(64),
    "AIRFLOW_API_SECRET_KEY": lambda: secrets.token_hex(32),
    "AIRFLOW_ADMIN_PASSWORD": _password,
    "MLFLOW_FLASK_SECRET_KEY": lambda: secrets.token_hex(32),
    "MLFLOW_ADMIN_PASSWORD": _password,
    "MLFLOW_TASKS_PASSWORD": _password,
}
"""Name in .env -> how it is made."""


def add_missing(path: Path) -> list[str]:
    """Adds to a file, made if need be, every secret that it does not set, and returns their names. What is there stays as it is.

    The file is then readable by its owner alone.
    """
    before = path.read_text("utf-8") if path.exists() else ""
    there = {name for name, value in re.findall(r"^\s*(?:export\s+)?(\w+)\s*=(.*)$", before, re.MULTILINE) if value.strip(" \t\"'")}
    missing = [name for name in SECRETS if name not in there]
    path.touch(0o600)
    path.chmod(0o600)  # before the first secret is in it
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if before and not before.endswith("\n") else "")
        file.writelines(f"{name}={SECRETS[name]()}\n" for name in missing)
    return missing


def main(path: str = ".env") -> None:
    added = add_missing(Path(path))
    print(f"{path}: added {', '.join(added)}" if added else f"{path} has every secret already")


if __name__ == "__main__":
    main(*sys.argv[1:])
