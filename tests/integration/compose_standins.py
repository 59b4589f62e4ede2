"""What stands in for images of others: the system's own Postgres and Redis, and Swift for the S3 gateway.

Each runs in the foreground on the ports and in the folder that it is given, with the names and passwords of the service's own
environment and, of Postgres and Redis, with the arguments of the service's own command.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from s3_server import s3_server, swift_programs

from retune.guard import Guarded

__all__ = ["ObjectStore", "Postgres", "Redis", "programs", "require"]


def programs(*names: str) -> dict[str, str]:
    """Where system packages put these programs. Skips the test, or fails it with RETUNE_ALL_TIERS=1, if one is missing."""
    places = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    )
    found = {name: shutil.which(name, path=places) for name in names}
    if missing := [name for name, place in found.items() if place is None]:
        said = f"not installed: {', '.join(missing)}; the packages postgresql and redis-server have them"
        if os.environ.get("RETUNE_ALL_TIERS") == "1":
            pytest.fail(f"RETUNE_ALL_TIERS=1, but {said}")
        pytest.skip(said)
    return {name: str(place) for name, place in found.items()}


def require() -> None:
    """Skips the test, or fails it with RETUNE_ALL_TIERS=1, where something that the stand-ins need is missing and cannot be installed."""
    programs("initdb", "postgres", "psql", "pg_isready", "pg_dump", "redis-server", "redis-cli")
    swift_programs()


class Postgres:
    """The service `postgres` as its image runs it: the first start makes the database of POSTGRES_DB and runs the scripts of
    /docker-entrypoint-initdb.d. As root, which Postgres refuses, it runs as the package's own user."""

    def __init__(self, port: int, folder: Path, environment: Mapping[str, str], arguments: Sequence[str], scripts: Path) -> None:
        self.port, self.folder, self.arguments, self.scripts = port, folder, tuple(arguments), scripts
        self.programs = programs("initdb", "postgres", "psql", "pg_isready")
        self.database = environment.get("POSTGRES_DB") or environment["POSTGRES_USER"]
        # For pg_isready and psql: in the container they find the server at the default place.
        self.environment = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(port),
            "PATH": f"{Path(self.programs['postgres']).parent}:{os.environ['PATH']}",
        }
        self._variables = {**os.environ, **environment, **self.environment, "PGUSER": environment["POSTGRES_USER"]}
        self._variables["PGPASSWORD"] = environment["POSTGRES_PASSWORD"]

    def command(self) -> list[str]:
        return self._as_user([self.programs["postgres"], *self._options("127.0.0.1"), *self.arguments])

    def prepare(self) -> None:
        """Makes the cluster, unless it is there."""
        if (self.folder / "PG_VERSION").is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(self.folder, *self._owner())
        self.folder.chmod(0o700)
        password = self.folder.with_suffix(".password")
        password.touch(0o600)
        password.write_text(self._variables["PGPASSWORD"])
        if os.geteuid() == 0:
            shutil.chown(password, *self._owner())
        how = ["--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        made = self._as_user([self.programs["initdb"], f"--pgdata={self.folder}", f"--username={self._variables['PGUSER']}", *how])
        try:
            done = subprocess.run(made, text=True, capture_output=True, cwd="/")
        finally:
            password.unlink()
        if done.returncode:
            raise RuntimeError(f"initdb ended with exit code {done.returncode}: {done.stderr[-2000:]}")
        first = self._as_user([self.programs["postgres"], *self._options("127.0.0.1")])
        with Guarded.start(first, cwd=Path("/"), output=Path(os.devnull)) as server:
            deadline = time.monotonic() + 60
            while subprocess.run([self.programs["pg_isready"], "-q"], env=self._variables).returncode:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"a new Postgres did not start (exit code {server.poll()}) in {self.folder}")
                time.sleep(0.1)
            if self.database != "postgres":
                self._psql("postgres", "-c", f'CREATE DATABASE "{self.database}"')
            for script in sorted(self.scripts.iterdir()) if self.scripts.is_dir() else ():
                if script.suffix == ".sql":
                    self._psql(self.database, "-f", str(script))
                elif script.suffix == ".sh":
                    environment = {**self._variables, "POSTGRES_DB": self.database}
                    subprocess.run(["bash", "-e", str(script)], env=environment, check=True, capture_output=True, text=True)

    def _psql(self, database: str, *arguments: str) -> None:
        subprocess.run([self.programs["psql"], "-qX", "-v", "ON_ERROR_STOP=1", "-d", database, *arguments], env=self._variables, check=True)

    def _options(self, address: str) -> list[str]:
        # No fsync: processes are killed here, never the machine.
        return ["-D", str(self.folder), "-p", str(self.port), "-c", f"listen_addresses={address}", "-k", "", "-c", "fsync=off"]

    def _as_user(self, command: list[str]) -> list[str]:
        if os.geteuid() != 0:
            return command
        user, _ = self._owner()
        return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--", *command]

    @staticmethod
    def _owner() -> tuple[str, str]:
        try:
            name = pwd.getpwnam("postgres").pw_name
        except KeyError:
            name = "nobody"
        return name, name


class Redis:
    """The service's own redis-server command, on a free port."""

    environment: Mapping[str, str] = {}

    def __init__(self, port: int, folder: Path, arguments: Sequence[str]) -> None:
        self.port, self.folder, self.program = port, folder, programs("redis-server")["redis-server"]
        self.arguments = [*arguments, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]

    def command(self) -> list[str]:
        return [self.program, *self.arguments]

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)


class ObjectStore:
    """Swift's s3api with the gateway's root keys: this module as a program."""

    def __init__(self, port: int, folder: Path, access_key: str, secret_key: str) -> None:
        self.port, self.folder = port, folder
        here = Path(__file__).parent
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "RETUNE_TEST_CACHE", "RETUNE_ALL_TIERS") if name in os.environ},
            "ACCESS_KEY": access_key,
            "SECRET_KEY": secret_key,
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1] / "src")]),
        }

    def command(self) -> list[str]:
        return [sys.executable, __file__, str(self.folder), str(self.port)]

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)


def _serve(folder: str, port: str) -> None:
    with s3_server(Path(folder), os.environ["ACCESS_KEY"], os.environ["SECRET_KEY"], int(port)) as s3:
        print(f"serving at {s3.endpoint}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
