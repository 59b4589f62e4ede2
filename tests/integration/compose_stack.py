"""Runs the services of docker-compose.yml as plain processes: each with its own command and environment, as the file and the Dockerfile
give them, in the order that its conditions give, checked by its own health checks, and restarted by its own restart policy.

    with compose_stack(project, folder, variables) as stack:
        stack.api(), stack.address("mlflow", 5000), stack.kill("worker"), stack.stop("postgres"), stack.start("postgres")

What is not as in containers, and nothing else:

- Addresses and paths are rewritten to this machine's (`compose_mapping`). A volume is a folder of the replica that mounts it, so that no
  two containers share one: replicas are as good as hosts of their own.
- Images of others have stand-ins (`compose_standins`): the system's Postgres and Redis, and Swift for the S3 gateway.
- What an image installs is one environment of this machine for all (`compose_environment`); what it copies of the project is copied.
- A container's host name comes from HOSTNAME, which a small module of the interpreter's start puts into `socket`; the same module hides
  torch where the image has none.
- A health check is executed until it has passed, at least every 3 seconds, and again when `wait_healthy` asks; an engine's goes on.
- A signal to a container reaches its first process; when that ends, the rest ends within seconds, not at once.
- Processes run as this process's user; Postgres, as root, as its own.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from checkouts import copy_project
from compose_environment import production_environment
from compose_file import ComposeFile, Service, read_compose, read_env
from compose_image import Image, read_image
from compose_mapping import DEFAULT_PORTS, Addresses, Paths
from compose_standins import ObjectStore, Postgres, Redis, require

from retune.guard import Guarded
from retune.local.airflow_api import Airflow
from retune.local.http import request
from retune.local.ports import LOOPBACK
from retune.production.secrets import add_missing

__all__ = ["Replica", "Stack", "compose_stack", "compose_variables", "production_project"]

PROMPTS: Mapping[str, Mapping[str, Any]] = {
    "ticket_priority": {"evaluate.probes": {"rows": 0}},
    "ticket_summary": {"tune.epochs": 1, "trials": [{}], "evaluate.few_shot": 0, "evaluate.probes": {"rows": 0}},
}
"""The example prompts and what makes their runs shorter."""
IMPATIENCE = 3.0
"""Seconds between two health checks of a service that has not passed one yet, where its interval is longer."""
LIVING = ("running", "healthy", "unhealthy")
HOSTNAME = '''"""A container has a host name of its own; plain processes share the machine's."""

import os
import socket
import sys

if not os.environ.get("IMAGE_HAS_TORCH"):
    sys.modules["torch"] = None  # cannot be imported
name, resolve = os.environ["HOSTNAME"], socket.getaddrinfo


def getaddrinfo(host, *arguments, **options):
    if host != name:
        return resolve(host, *arguments, **options)
    return [(*found[:3], name, found[4]) for found in resolve("127.0.0.1", *arguments, **options)]


socket.gethostname, socket.getfqdn, socket.getaddrinfo = lambda: name, lambda _="": _ or name, getaddrinfo
'''


def compose_variables(env: Path, workers: int = 2) -> dict[str, str]:
    """What stands in an .env file that is made by the command of `make secrets`, with so many workers for trials."""
    add_missing(env)
    # Swift's keys have this form, the S3 gateway's any.
    return read_env(env) | {
        "OBJECT_STORE_ACCESS_KEY": "retune:tests",
        "RETUNE_GPU_WORKERS": str(workers),
        "RETUNE_THREADS": "1",
        "RETUNE_CODE_COMMIT": "0" * 40,
        "RETUNE_INGEST_CRON": "0 0 1 1 *",
    }


def production_project(folder: Path) -> Path:
    """A checkout whose example prompts have their landing zone in the bucket `landing`, and little to tune."""
    folder.mkdir(parents=True)
    copy_project(folder)
    for name, less in PROMPTS.items():
        place = folder / f"prompts/{name}.yaml"
        prompt = yaml.safe_load(place.read_text("utf-8"))
        prompt["source"]["path"] = f"s3://landing/{name}"
        prompt["schedule"]["cron"] = None
        for path, value in less.items():
            section, _, key = path.rpartition(".")
            (prompt[section] if section else prompt)[key] = value
        place.write_text(yaml.safe_dump(prompt, sort_keys=False, allow_unicode=True), "utf-8")
    return folder


class Replica:
    """One container's worth of a service: its processes, and a thread that does what an engine does for it."""

    def __init__(self, stack: "Stack", service: Service, number: int) -> None:
        self.stack, self.service, self.number = stack, service, number
        self.name = f"{service.name}-{number}"
        self.root = stack.folder / "containers" / self.name
        self.log = stack.folder / "logs" / f"{self.name}.log"
        self.state = "waiting"
        """waiting, running, healthy, unhealthy, completed, stopped or failed; `why` has what there is to say of it."""
        self.why = ""
        self.starts = 0
        self._guard: int | None = None
        self._main: psutil.Process | None = None
        self._wanted = threading.Event()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._live, name=self.name, daemon=True)
        self._prepared = False

    # ---- what a container starts with

    def _prepare(self) -> None:
        """Lays the container's file system, once: what it wrote before a restart is still there."""
        if self._prepared:
            return
        stack, service = self.stack, self.service
        self.image = stack.image(service)
        targets = [mount.target for mount in service.mounts]
        self.paths = Paths.of(self.root, [*self.image.paths, *targets, *([service.working_dir] if service.working_dir else ())])
        self.cwd = self.paths.place(service.working_dir or self.image.working_dir)
        for folder in (self.cwd, self.root / "tmp", self.root / "home" / self.image.user):
            folder.mkdir(parents=True, exist_ok=True)
        self.image.lay(stack.project, self.root)
        for mount in service.mounts:
            place = self.paths.place(mount.target)
            place.parent.mkdir(parents=True, exist_ok=True)
            if mount.content is not None:
                place.write_text(self.rewritten(mount.content))
            elif mount.is_bind and (source := stack.compose.folder / str(mount.source)).is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True)
            elif mount.is_bind:
                place.write_text(self.rewritten((stack.compose.folder / str(mount.source)).read_text("utf-8")))
            else:
                place.mkdir(parents=True, exist_ok=True)
        host = self.root / "host"
        host.mkdir()
        (host / "sitecustomize.py").write_text(HOSTNAME)
        written = {**self.image.environment, **service.environment}
        self.environment = {key: self.rewritten(value) for key, value in written.items() if key != "PATH"}
        self.environment |= stack.addresses.environment(written)
        # The image has the project's package installed from there.
        python_path = [self.environment.get("PYTHONPATH", ""), str(self.cwd / "src"), str(host)]
        self.environment |= {
            "IMAGE_HAS_TORCH": "1" if self.image.has_torch else "",
            "HOSTNAME": service.name if service.replicas == 1 else self.name,
            "HOME": str(self.root / "home" / self.image.user),
            "TMPDIR": str(self.root / "tmp"),
            "PATH": f"{stack.programs}:{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": ":".join(filter(None, python_path)),
            "NO_PROXY": LOOPBACK,
            "no_proxy": LOOPBACK,
        }
        self.stand_in = self._stand_in()
        if self.stand_in:
            self.environment |= self.stand_in.environment
            self.command = self.stand_in.command()
        else:
            entrypoint = self.image.entrypoint if service.entrypoint is None else service.entrypoint
            default = self.image.command if service.entrypoint is None else ()
            self.command = [self.rewritten(word) for word in (*entrypoint, *(service.command or default))]
        self._prepared = True

    def rewritten(self, text: str) -> str:
        return self.stack.addresses.rewritten(self.paths.rewritten(text), self.service.name, self.number)

    def _stand_in(self) -> Postgres | Redis | ObjectStore | None:
        image, service = self.service.image.rpartition("/")[2].partition(":")[0], self.service
        arguments = [self.rewritten(word) for word in service.command or ()]
        if image == "postgres":
            volume = self.stack.outside / self.name  # Postgres's user cannot enter the folders of a test
            scripts = self.paths.place("/docker-entrypoint-initdb.d")
            port = self.stack.addresses.port(service.name, DEFAULT_PORTS["postgres"], self.number)
            return Postgres(port, volume, self.environment, arguments[arguments[:1] == ["postgres"] :], scripts)
        if image == "redis":
            port = self.stack.addresses.port(service.name, DEFAULT_PORTS["redis"], self.number)
            return Redis(port, self.root / "data", arguments[arguments[:1] == ["redis-server"] :])
        if image == "retune-object-store":
            (port,) = {self.stack.addresses.port(service.name, port, self.number) for port in self.stack.addresses.ports(service.name)}
            environment = service.environment
            return ObjectStore(port, self.root / "data", environment["ROOT_ACCESS_KEY_ID"], environment["ROOT_SECRET_ACCESS_KEY"])
        if service.target is None:
            raise RuntimeError(f"{service.name}: nothing stands in for the image {service.image}")
        return None

    # ---- its life

    def begin(self) -> None:
        self._wanted.set()
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self.terminate()
        if self._thread.ident is not None:  # it was begun
            self._thread.join(120)

    def _live(self) -> None:
        """As an engine: waits for what it depends on, starts, checks its health, and starts again by the restart policy."""
        try:
            for other, condition in self.service.depends_on.items():
                self.stack.await_condition(self, other, condition)
            wait = 0.1
            while not self._closing:
                if not self._wanted.wait(0.2):
                    continue
                self._prepare()
                code, lived = self._run()
                if self._closing or not self._wanted.is_set():
                    self._become("stopped")
                    continue
                if self.service.restart == "no" or (self.service.restart.startswith("on-failure") and code == 0):
                    self._become("completed" if code == 0 else "failed", f"ended with exit code {code}")
                    return
                # As Docker: from a tenth of a second, doubled each time, forgotten after 10 s of life.
                wait = 0.1 if lived > 10 else min(wait * 2, 60)
                self._become("waiting", f"ended with exit code {code} after {lived:.0f} s")
                time.sleep(wait)
        except Exception as error:  # noqa: BLE001 - of a thread: whoever waits for the replica is told
            self._become("failed", f"{type(error).__name__}: {error}")

    def _run(self) -> tuple[int, float]:
        """One life of the container's process: its exit code and seconds."""
        if self.stand_in:
            self.stand_in.prepare()
        begun = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self._changed:
            if not self._wanted.is_set():  # stopped since
                return 0, 0.0
            guarded = Guarded.start(self.command, cwd=self.cwd, env=self.environment, output=self.log)
            self._guard, self._main = guarded.pid, _first_child(guarded.pid)
            self.starts += 1
            self._become("running")
        check, ask_at = self.service.healthcheck, begun + 0.5
        while (code := guarded.poll()) is None:
            if check and self.state == "running" and time.monotonic() >= ask_at:
                if self.probe():
                    self._become("healthy")
                elif time.monotonic() > begun + check.start_period + check.retries * check.interval:
                    self._become("unhealthy")
                ask_at = time.monotonic() + min(check.interval, IMPATIENCE)
            time.sleep(0.05)
        self._guard = self._main = None
        return code, time.monotonic() - begun

    def probe(self) -> bool:
        """Whether the service's own health check passes now."""
        check = self.service.healthcheck
        if check is None:
            return self.alive
        command = self._check_command(check.test)
        log = self.log.with_suffix(".health.log")
        with Guarded.start(command, cwd=self.cwd, env=self.environment, output=log) as guarded:
            return guarded.wait_for(check.timeout) == 0

    def _check_command(self, test: Sequence[str]) -> list[str]:
        if isinstance(self.stand_in, ObjectStore):  # says elsewhere that it is well
            return [sys.executable, "-m", "retune.production.health", f"http://{LOOPBACK}:{self.stand_in.port}/healthcheck"]
        command = [self.rewritten(word) for word in test]
        if isinstance(self.stand_in, Redis) and command[0] == "redis-cli":  # no variable tells it the port
            command[1:1] = ["-h", LOOPBACK, "-p", str(self.stand_in.port)]
        return command

    def _become(self, state: str, why: str = "") -> None:
        with self._changed:
            self.state, self.why = state, why
            self._changed.notify_all()

    def wait_for(self, wanted: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not wanted():
                if self.state == "failed" or self._closing or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} is not {what} but {self.state} {self.why}\n{self.tail()}")
                self._changed.wait(0.5)

    def tail(self, lines: int = 30) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])
        return ""

    # ---- what is done to it

    @property
    def alive(self) -> bool:
        return self._guard is not None

    def processes(self) -> list[psutil.Process]:
        """All of the container's processes, its first one first."""
        guard, main = self._guard, self._main
        if guard is None or main is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return [main, *(process for process in psutil.Process(guard).children(recursive=True) if process != main)]
        return []

    def kill(self, comes_back: bool = True) -> None:
        """SIGKILL to every process at once, as when the machine has no memory left or no power; returns when they are gone."""
        with self._changed:
            if not comes_back:
                self._wanted.clear()
            life, ended = self.starts, self.processes()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # so that none has time to react to another's end
            for process in ended:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        self._await_end(life, 30)

    def terminate(self) -> None:
        """As `docker stop`: the stop signal to the first process, and after the grace period SIGKILL to all."""
        with self._changed:
            self._wanted.clear()
            life, main = self.starts, self._main
        if main is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                main.send_signal(getattr(signal, self.service.stop_signal))
        if not self._await_end(life, self.service.stop_grace):
            self.kill(comes_back=False)

    def _await_end(self, life: int, seconds: float) -> bool:
        """Whether the life of that number ended in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.starts > life or self.state not in LIVING, seconds)

    def start(self) -> None:
        self._wanted.set()


class Stack:
    """The running services. A service's name means all of its replicas, `name-2` one of them."""

    def __init__(self, project: Path, folder: Path, compose: ComposeFile, given: Mapping[str, str], programs: Path) -> None:
        self.project, self.folder, self.compose, self.programs = project, folder, compose, programs
        self.given = dict(given)
        """What stands in .env."""
        self.outside = Path(tempfile.mkdtemp(prefix="retune-compose-"))
        self.outside.chmod(0o711)
        self._images: dict[str, Image] = {}
        self._token: str | None = None
        self._lock = threading.Lock()
        self.addresses = Addresses(compose)
        self.replicas = [Replica(self, service, n) for service in compose.services.values() for n in range(1, service.replicas + 1)]

    def image(self, service: Service) -> Image:
        if service.target is None:
            return Image()
        with self._lock:
            if service.target not in self._images:
                self._images[service.target] = read_image(self.project / "Dockerfile", service.target, service.build_arguments)
            return self._images[service.target]

    def of(self, name: str) -> list[Replica]:
        found = [replica for replica in self.replicas if name in (replica.service.name, replica.name)]
        if not found:
            raise KeyError(f"no service {name!r}; there are {', '.join(self.compose.services)}")
        return found

    def await_condition(self, who: Replica, other: str, condition: str) -> None:
        for replica in self.of(other):
            if condition == "service_completed_successfully":
                replica.wait_for(lambda r=replica: r.state == "completed", 300, "completed")
            elif condition == "service_healthy":
                replica.wait_for(lambda r=replica: r.state == "healthy", 300, "healthy")
            else:
                replica.wait_for(lambda r=replica: r.starts > 0, 300, "started")

    def wait_healthy(self, *names: str, seconds: float = 300) -> None:
        """Returns once each service (all by default) passes its own health check now, or has completed if it is one that does.

        A check knows what it asks: Airflow reports a scheduler that died as healthy for half a minute more.
        """
        deadline = time.monotonic() + seconds
        for replica in [r for name in names or self.compose.services for r in self.of(name)]:
            settled = ("healthy", "completed") if replica.service.healthcheck else ("running", "completed")
            while True:
                replica.wait_for(lambda r=replica, s=settled: r.state in s, max(deadline - time.monotonic(), 0), " or ".join(settled))
                if replica.state == "completed" or replica.probe():
                    break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{replica.name} is not healthy within {seconds:.0f} s\n{replica.tail()}")
                time.sleep(0.5)

    def kill(self, name: str, comes_back: bool = True) -> None:
        for replica in self.of(name):
            replica.kill(comes_back)

    def stop(self, name: str) -> None:
        for replica in self.of(name):
            replica.terminate()

    def start(self, name: str) -> None:
        for replica in self.of(name):
            replica.start()

    def processes(self, name: str) -> list[psutil.Process]:
        return [process for replica in self.of(name) for process in replica.processes()]

    def variables(self, name: str) -> Mapping[str, str]:
        """The environment that a service's first replica runs with."""
        return self.of(name)[0].environment

    def api(self) -> Airflow:
        """Airflow's REST API, logged in with the administrator's password."""
        return Airflow(self.address("api-server", 8080), "admin", self.given["AIRFLOW_ADMIN_PASSWORD"])

    def ask(self, path: str) -> Any:
        """The answer of Airflow's REST API to a GET, with a token for an hour or so of tests."""
        place = self.address("api-server", 8080)
        if self._token is None:
            login = {"username": "admin", "password": self.given["AIRFLOW_ADMIN_PASSWORD"]}
            self._token = str(request(f"{place}/auth/token", "POST", login)["access_token"])
        return request(f"{place}/api/v2/{path}", token=self._token, timeout=60)

    def address(self, name: str, port: int) -> str:
        """Where this machine finds a port of a service."""
        return f"http://{LOOPBACK}:{self.addresses.port(name, port)}"

    def close(self) -> None:
        stopping = [threading.Thread(target=replica.close) for replica in reversed(self.replicas)]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        left = [" ".join(process.cmdline()) for process in psutil.process_iter() if self._owns(process)]
        shutil.rmtree(self.outside, ignore_errors=True)
        if left:
            raise RuntimeError(f"left behind in {self.folder}: {left}")

    def _owns(self, process: psutil.Process) -> bool:
        """Whether a process works in the folder of one of the containers, or was told to."""
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE:
                return Path(process.cwd()).is_relative_to(self.folder) or process.environ().get("TMPDIR", "").startswith(f"{self.folder}/")
        return False


@contextlib.contextmanager
def compose_stack(project: Path, folder: Path, variables: Mapping[str, str], wait: bool = True) -> Iterator[Stack]:
    """Starts every service of the project's docker-compose.yml with its state and logs in `folder`; stops all of it at the end.

    `variables` are what stands in `.env`.
    """
    require()
    compose = read_compose(project / "docker-compose.yml", variables)
    stack = Stack(project, folder, compose, variables, production_environment())
    try:
        for replica in stack.replicas:
            replica.begin()
        if wait:
            stack.wait_healthy()
        yield stack
    finally:
        stack.close()


def _first_child(pid: int) -> psutil.Process | None:
    """The process that a guard guards: the container's first."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        guard = psutil.Process(pid)
        while time.monotonic() < deadline:
            if children := guard.children():
                return children[0]
            time.sleep(0.005)
    return None
