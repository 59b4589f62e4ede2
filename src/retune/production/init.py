"""The service `init` of docker-compose.yml: `python -m retune.production.init`, at every start, before anything else of Retune runs.

Checks that the object store can hold ledgers, makes buckets, database roles and databases, brings the tables of Airflow and MLflow to
the installed versions, and makes pools and users. What is there stays; a repetition changes nothing but the passwords of the services,
which follow .env, while those of people are theirs once they are made.

Reads: the environment that docker-compose.yml gives it, PG* for the database's superuser. Raises ConfigError where the object store
cannot be used, RetuneError where a step fails; nothing that depends on `init` starts then.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from retune.errors import RetuneError
from retune.store import check_create, open_store, s3_client

__all__ = ["main"]

GPU_POOL = "gpu"
TASKS_USER = "retune"
"""Who MLflow takes the tasks for."""
ADMIN = "admin"
"""The first user of either web UI."""


@dataclass(frozen=True)
class _Role:
    """A login of the database server with databases that nobody else may connect to."""

    name: str
    databases: tuple[str, ...]
    password: str


def main(environ: Mapping[str, str]) -> None:
    _store(environ)
    _databases(
        [
            _Role("airflow", ("airflow",), environ["AIRFLOW_DB_PASSWORD"]),
            _Role("celery", ("celery",), environ["CELERY_DB_PASSWORD"]),
            _Role("mlflow", ("mlflow", "mlflow_auth"), environ["MLFLOW_DB_PASSWORD"]),
        ]
    )
    _mlflow(environ)
    _airflow(environ)
    _say("done")


def _store(environ: Mapping[str, str]) -> None:
    endpoint = environ["AWS_ENDPOINT_URL_S3"]
    places = [environ[name] for name in ("RETUNE_STORE", "MLFLOW_ARTIFACTS_DESTINATION", "AIRFLOW__LOGGING__REMOTE_BASE_LOG_FOLDER")]
    client = s3_client(endpoint)
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in dict.fromkeys(urlsplit(place).netloc for place in places):
        if bucket not in there:
            client.create_bucket(Bucket=bucket)
            _say(f"made bucket {bucket}")
    # Each time: an upgrade of the store, or another one in its place, must not cost a ledger its promise.
    check_create(open_store(environ["RETUNE_STORE"], endpoint))
    _say("the object store creates atomically")


def _databases(roles: list[_Role]) -> None:
    from psycopg import connect, sql

    with connect(autocommit=True) as connection:
        for role in roles:
            # Hashed here, so that no log of statements ever holds a password.
            hashed = connection.pgconn.encrypt_password(role.password.encode(), role.name.encode(), b"scram-sha-256").decode()
            known = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [role.name]).fetchone() is not None
            verb = sql.SQL("ALTER" if known else "CREATE")
            connection.execute(sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(verb, sql.Identifier(role.name), sql.Literal(hashed)))
            for database in role.databases:
                name = sql.Identifier(database)
                if connection.execute("SELECT FROM pg_database WHERE datname = %s", [database]).fetchone() is None:
                    connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, sql.Identifier(role.name)))
                    _say(f"made database {database}")
                connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))


def _mlflow(environ: Mapping[str, str]) -> None:
    """Tables and users of MLflow, as its role: what it makes is its own."""
    login = {"PGUSER": "mlflow", "PGPASSWORD": environ["MLFLOW_DB_PASSWORD"]}
    _run([sys.executable, "-m", "mlflow", "db", "upgrade", "postgresql+psycopg2:///mlflow"], login)
    _run([sys.executable, "-m", "retune.production.mlflow_users", "postgresql+psycopg2:///mlflow_auth"], login)


def _airflow(environ: Mapping[str, str]) -> None:
    airflow = [sys.executable, "-m", "airflow"]
    quiet = {"AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING"}  # else a line for each of hundreds of permissions
    _run([*airflow, "db", "migrate"], quiet)
    # A pool that is there keeps its slots, which may be somebody's choice; a missing one would block its tasks without a word.
    if subprocess.run([*airflow, "pools", "get", GPU_POOL], capture_output=True).returncode:
        # Without a worker of their own (0), one worker does their tasks beside the others.
        slots = int(environ.get("RETUNE_GPU_SLOTS") or 1) * max(int(environ.get("RETUNE_GPU_WORKERS") or 1), 1)
        _run([*airflow, "pools", "set", GPU_POOL, str(slots), "Trials that tune at the same time"], quiet)
    password = environ["AIRFLOW_ADMIN_PASSWORD"]
    names = ["--username", ADMIN, "--firstname", "Retune", "--lastname", "Admin", "--email", f"{ADMIN}@localhost", "--role", "Admin"]
    # Asked for twice on standard input: no list of processes shows it.
    _run([*airflow, "users", "create", *names], quiet, text=f"{password}\n{password}\n")


def _run(command: list[str], environment: Mapping[str, str] | None = None, text: str | None = None) -> None:
    what = " ".join(["python", *command[1:]])
    started = time.monotonic()
    # Without a terminal of its own, a command that asks for a password reads it from standard input.
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, input=text, text=True, start_new_session=True)
    if done.returncode:
        raise RetuneError(f"{what} ended with exit code {done.returncode}; its message stands above")
    _say(f"{what} ({time.monotonic() - started:.0f} s)")


def _say(text: str) -> None:
    print(f"init: {text}", flush=True)


if __name__ == "__main__":
    try:
        main(os.environ)
    except RetuneError as error:
        sys.exit(f"init: {error}")
