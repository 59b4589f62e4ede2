"""The process that owns the stack's components: `python -m retune.local.supervisor`, started by `retune up`.

It holds the folder's lock for as long as it lives, starts each component under a guard (`retune.guard`), restarts one that dies, and
stops all of them on SIGTERM. If it is itself killed, the guards see their pipes close and end everything.

Standard output: one JSON object a line on how the start goes. Standard input: the starter's pipe; a line "detach" lets the stack live
on without the starter, an end of the pipe before that (Ctrl-C, a killed terminal) stops it.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from types import FrameType
from typing import Any

import psutil

from retune.errors import RetuneError
from retune.guard import Guarded
from retune.local.airflow_api import Airflow
from retune.local.components import Component, components, healthy, migrate
from retune.local.configuration import GPU_SLOTS, USER, Configuration, component_environment, configure
from retune.local.files import read_json, write_private
from retune.local.http import answers
from retune.local.record import ALREADY, LEFTOVERS, MARKER, READY_WITHIN, Process, Stack, lock, marked
from retune.settings import Settings, without_password

__all__ = ["Backoff", "main", "tail"]

GPU_POOL = "gpu"
LOG_BYTES = 20_000_000
"""A component's log that is longer moves to `.1` at the next start."""
PORT_ATTEMPTS = 3
RESTARTS, WINDOW = 5, 300.0
"""A component that died this often within so many seconds is left for dead."""


class _PortTaken(RetuneError):
    """A component found its port in use."""


class _StopAsked(Exception):
    """SIGTERM, or the starter is gone."""


@dataclass
class Backoff:
    """When to start a component again."""

    deaths: deque[float] = field(default_factory=deque)

    def after_death(self, now: float) -> float | None:
        """Seconds to wait before the next start: 1, 2, 4, 8, 16; None if it died too often lately."""
        self.deaths.append(now)
        while self.deaths[0] < now - WINDOW:
            self.deaths.popleft()
        return None if len(self.deaths) > RESTARTS else float(2 ** (len(self.deaths) - 1))


@dataclass
class _Owned:
    """A component and its process."""

    component: Component
    process: Guarded
    started: float
    backoff: Backoff = field(default_factory=Backoff)
    restarts: int = 0
    again_at: float | None = None
    """When to start it anew, after it died."""
    failed: bool = False

    def state(self) -> dict[str, Any]:
        state = "failed" if self.failed else "restarting" if self.again_at is not None else "running"
        return {"pid": self.process.pid, "state": state, "restarts": self.restarts, "log": str(self.component.log)}


def tail(component: Component, lines: int = 15) -> str:
    """The end of a component's log."""
    with contextlib.suppress(OSError):
        return "\n".join(component.log.read_text("utf-8", "replace").splitlines()[-lines:])
    return ""


class _Supervisor:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.owned: dict[str, _Owned] = {}
        self.attached = True

    def say(self, **event: Any) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps(event), flush=True)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, _ask_to_stop)
        signal.signal(signal.SIGINT, _ask_to_stop)
        try:
            self._clear_leftovers()
            stack, environment = self._start_on_free_ports()
            stack.save(self.settings)
            self.say(event="ready")
            self._detach()
            self._watch(stack, environment)
        except _StopAsked:
            log("stopping")
        except RetuneError as error:
            log(f"failed: {error}")
            self.say(event="failed", message=str(error))
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # the stop below is under way already, and bounded
            self._stop()

    def _clear_leftovers(self) -> None:
        """Waits until nothing of a stack that was killed in this folder runs any more: two schedulers on one database do harm."""
        (self.settings.home / "stack.json").unlink(missing_ok=True)
        deadline = time.monotonic() + LEFTOVERS
        while left := marked(self.settings):
            if time.monotonic() > deadline:
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            self._pause(0.2)

    def _start_on_free_ports(self) -> tuple[Stack, dict[str, str]]:
        """Starts everything; anew on other ports if somebody took one between its choice and its use."""
        for attempt in range(1, PORT_ATTEMPTS + 1):
            configuration = configure(self.settings, os.environ)
            environment = component_environment(self.settings, configuration, os.environ)
            try:
                return self._start(configuration, environment), environment
            except _PortTaken as error:
                if attempt == PORT_ATTEMPTS:
                    raise
                log(f"{error.args[0].splitlines()[0]}: its port was taken meanwhile; starting on other ports")
                self.say(event="port_taken")
                self._stop()
                self.owned.clear()
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _start(self, configuration: Configuration, environment: dict[str, str]) -> Stack:
        if configuration.mlflow_external and not answers(f"{configuration.mlflow_url}/health"):
            raise RetuneError(
                f"MLFLOW_TRACKING_URI names {without_password(configuration.mlflow_url)}, which does not answer: "
                "start it, or unset the variable and the stack runs its own"
            )
        wanted = components(configuration)
        first = [c for c in wanted if c.name == "mlflow"]  # needs no Airflow database
        for component in first:
            self._launch(component, environment)
        self._migrate(configuration, environment)
        for component in wanted:
            if component not in first:
                self._launch(component, environment)
        deadline = time.monotonic() + READY_WITHIN
        well: set[str] = set()
        begun = time.monotonic()
        while len(well) < len(wanted):
            self._pause(0.25)
            for owned in self.owned.values():
                if (code := owned.process.poll()) is not None:
                    raise _start_error(owned.component, f"ended with exit code {code}")
            for name in sorted(healthy(configuration, {n: o.started for n, o in self.owned.items()}) - well):
                well.add(name)
                self.say(event="healthy", component=name, seconds=round(time.monotonic() - begun, 1))
            if time.monotonic() > deadline:
                name = next(n for n in self.owned if n not in well)
                raise _start_error(self.owned[name].component, f"is not healthy after {READY_WITHIN:.0f} s")
        password = (read_json(configuration.password_file) or {})[USER]
        Airflow(configuration.airflow_url, USER, password).ensure_pool(GPU_POOL, GPU_SLOTS, "Trials that tune at the same time")
        return Stack(
            supervisor=Process.of(os.getpid()),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            airflow_url=configuration.airflow_url,
            airflow_home=str(configuration.airflow_home),
            user=USER,
            password_file=str(configuration.password_file),
            mlflow_url=configuration.mlflow_url,
            mlflow_external=configuration.mlflow_external,
            components={n: o.state() for n, o in self.owned.items()},
        )

    def _migrate(self, configuration: Configuration, environment: dict[str, str]) -> None:
        """Makes or upgrades Airflow's database, unless this version of Airflow has already done so."""
        done, database = configuration.airflow_home / "migrated.json", configuration.airflow_home / "airflow.db"
        stamp = {"airflow": version("apache-airflow")}
        if database.exists() and read_json(done) == stamp:
            return
        self.say(event="migrating")
        component = migrate(configuration)
        with Guarded.start(component.command, cwd=self.settings.project, env=environment, output=component.log) as process:
            while (code := process.poll()) is None:
                self._pause(0.1)
        if code != 0:
            raise _start_error(component, f"ended with exit code {code}")
        # Readers and a writer do not wait for each other in this mode, which the file keeps; four processes share it.
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        write_private(done, json.dumps(stamp))

    def _launch(self, component: Component, environment: dict[str, str]) -> Guarded:
        with contextlib.suppress(FileNotFoundError):
            if component.log.stat().st_size > LOG_BYTES:
                shutil.move(component.log, component.log.with_suffix(".log.1"))
        env = {k: v for k, v in {**environment, **component.environment}.items() if component.environment.get(k) != ""}
        process = Guarded.start(component.command, cwd=self.settings.project, env=env, output=component.log)
        log(f"{component.name}: guard {process.pid}: {' '.join(component.command)}")
        if component.name in self.owned:
            owned = self.owned[component.name]
            owned.process, owned.started, owned.again_at = process, time.time(), None
        else:
            self.owned[component.name] = _Owned(component, process, time.time())
        return process

    def _pause(self, seconds: float) -> None:
        """Sleeps; raises _StopAsked if the starter goes away meanwhile."""
        if not self.attached:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            if b"detach" in os.read(0, 100):
                self.attached = False
            else:
                raise _StopAsked

    def _detach(self) -> None:
        deadline = time.monotonic() + 10
        while self.attached and time.monotonic() < deadline:
            self._pause(0.5)
        if self.attached:
            raise _StopAsked
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)

    def _watch(self, stack: Stack, environment: dict[str, str]) -> None:
        log("ready")
        while True:
            time.sleep(0.5)
            changed = False
            for name, owned in self.owned.items():
                if owned.failed:
                    continue
                if owned.again_at is None:
                    if (code := owned.process.poll()) is None:
                        continue
                    changed, wait = True, owned.backoff.after_death(time.monotonic())
                    owned.failed = wait is None
                    owned.again_at = time.monotonic() + (wait or 0)
                    log(f"{name}: ended with exit code {code}; " + ("left for dead" if wait is None else f"starts again in {wait:.0f} s"))
                elif time.monotonic() >= owned.again_at:
                    changed, owned.restarts = True, owned.restarts + 1
                    self._launch(owned.component, environment)
            if changed:
                stack.components.update({n: o.state() for n, o in self.owned.items()})
                stack.save(self.settings)

    def _stop(self) -> None:
        for owned in self.owned.values():
            with contextlib.suppress(ProcessLookupError):
                if owned.process.poll() is None:
                    os.kill(owned.process.pid, signal.SIGTERM)  # all at once; `stop` then waits for each
        for owned in self.owned.values():
            owned.process.stop()
        (self.settings.home / "stack.json").unlink(missing_ok=True)
        log("stopped")


def _ask_to_stop(_number: int, _frame: FrameType | None) -> None:
    raise _StopAsked


def _start_error(component: Component, what: str) -> RetuneError:
    end = tail(component)
    kind = _PortTaken if "address already in use" in end.lower() else RetuneError
    return kind(f"{component.name} {what}. The end of {component.log}:\n{end}")


def log(text: str) -> None:
    print(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def main() -> int:
    settings = Settings.load()
    os.environ.setdefault(MARKER, str(settings.home))
    with _private_files(), lock(settings) as ours:
        if not ours:
            return ALREADY
        _Supervisor(settings).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
