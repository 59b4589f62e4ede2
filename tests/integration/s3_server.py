"""A real S3 server for tests: OpenStack Swift with its s3api, four processes on loopback ports, one device, nothing left afterwards.

    with s3_server(tmp_path) as s3:
        s3.endpoint, s3.access_key, s3.secret_key, s3.env, s3.make_bucket("name")

Swift comes from PyPI into an environment of its own, `swift-venv` in RETUNE_TEST_CACHE (else `.retune` of the checkout), made at
the first use: about 25 s and 80 MB. Its wheels bring all that it needs, liberasurecode included. Where that environment cannot be
made, tests are skipped with the reason; with RETUNE_ALL_TIERS=1 they fail.
"""

import contextlib
import fcntl
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from retune.guard import Guarded
from retune.store import s3_client

__all__ = ["S3", "s3_server", "swift_programs"]

REQUIREMENTS = ("swift==2.38.3", "eventlet==0.41.3", "pyeclib==1.8.0", "setuptools==65.5.0")
SERVERS = ("account", "container", "object", "proxy")


@dataclass(frozen=True)
class S3:
    endpoint: str
    access_key: str
    secret_key: str
    no_settings: Path
    """An empty file, in place of the host's AWS settings (DVC refuses /dev/null)."""

    @property
    def env(self) -> dict[str, str]:
        """What any AWS client needs in its environment, and nothing of the host's own AWS settings."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(self.no_settings),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.no_settings),
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> str:
        """Makes an empty bucket and returns its name. The process's environment must hold `env`."""
        s3_client(self.endpoint).create_bucket(Bucket=name)
        return name


@contextlib.contextmanager
def s3_server(folder: Path, access_key: str = "test:tester", secret_key: str = "testing", port: int | None = None) -> Iterator[S3]:
    """Starts the server with its state and logs in `folder`; stops it at the end, however that comes.

    A folder in which one ran before still holds its objects. An access key must be of the form account:user.
    Skips the test, or fails it with RETUNE_ALL_TIERS=1, if Swift cannot be installed.
    """
    with contextlib.ExitStack() as running:
        endpoint = _start(swift_programs(), folder / "swift", (access_key, secret_key), port, running)
        no_settings = folder / "swift" / "no-aws-settings"
        no_settings.touch()
        yield S3(endpoint, access_key, secret_key, no_settings)


def swift_programs() -> Path:
    """The folder of Swift's programs, installed if need be. Skips or fails the test where that cannot be done."""
    try:
        return _environment()
    except _PrerequisiteMissingError as error:
        if os.environ.get("RETUNE_ALL_TIERS") == "1":
            pytest.fail(f"RETUNE_ALL_TIERS=1, but there is no S3 server: {error}")
        pytest.skip(f"no S3 server: {error}")


class _PrerequisiteMissingError(Exception):
    pass


def _environment() -> Path:
    """The folder of Swift's programs. Made once; other test processes wait meanwhile."""
    cache = Path(os.environ.get("RETUNE_TEST_CACHE") or Path(__file__).parents[2] / ".retune").absolute()
    folder = cache / "swift-venv"
    complete = folder / "complete"
    wanted = "\n".join(REQUIREMENTS)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "swift-venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.is_file() or complete.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            for command in (
                [sys.executable, "-m", "venv", folder],
                [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS],
                [folder / "bin/python", "-c", "import swift.proxy.server, swift.obj.server, lxml.etree"],
            ):
                done = subprocess.run(command, capture_output=True, text=True, errors="replace")
                if done.returncode:
                    said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
                    raise _PrerequisiteMissingError(f"{' '.join(map(str, command))} ended with {done.returncode}: {said}")
            complete.write_text(wanted)
    return folder / "bin"


def _start(programs: Path, folder: Path, keys: tuple[str, str], port: int | None, running: contextlib.ExitStack) -> str:
    ports = _free_ports(len(SERVERS))
    ports["proxy"] = port or ports["proxy"]
    (folder / "devices" / "d1").mkdir(parents=True, exist_ok=True)
    _configure(folder, ports, keys)
    subprocess.run([programs / "python", "-c", _RINGS, folder, *(str(ports[name]) for name in SERVERS[:3])], check=True)
    env = {**os.environ, "PYTHONPATH": str(folder)}
    started = {}
    for name in SERVERS:
        command = [programs / f"swift-{name}-server", folder / f"{name}.conf", "--verbose"]
        started[name] = running.enter_context(Guarded.start(command, env=env, output=folder / f"{name}.log"))
    endpoint = f"http://127.0.0.1:{ports['proxy']}"
    deadline = time.monotonic() + 60
    for name, server in started.items():
        while not _answers(f"http://127.0.0.1:{ports[name]}/healthcheck"):
            if server.poll() is not None or time.monotonic() > deadline:
                log = (folder / f"{name}.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"swift's {name} server did not start (exit code {server.poll()}): {log}")
            time.sleep(0.05)
    return endpoint


def _free_ports(count: int) -> dict[str, int]:
    with contextlib.ExitStack() as sockets:  # held together, so that no two are equal
        bound = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return {name: one.getsockname()[1] for name, one in zip(SERVERS, bound, strict=True)}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


_RINGS = """
import sys
from swift.common.ring import RingBuilder

folder, *ports = sys.argv[1:]
for name, port in zip(("account", "container", "object"), ports, strict=True):
    builder = RingBuilder(part_power=2, replicas=1, min_part_hours=0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1", "weight": 1.0})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{name}.ring.gz")
"""

_SERIAL_CREATE = """
from eventlet.semaphore import Semaphore


class SerialCreate:
    def __init__(self, app):
        self.app = app
        self.turn = Semaphore()

    def __call__(self, env, start_response):
        if env["REQUEST_METHOD"] != "PUT" or "HTTP_IF_NONE_MATCH" not in env:
            return self.app(env, start_response)
        with self.turn:
            return [b"".join(self.app(env, start_response))]


def filter_factory(global_conf, **conf):
    return SerialCreate
"""
"""Makes conditional creates atomic, as S3 promises. Swift's own are not: its object server looks first and writes later, and of 100
races of eight writers 77 had more than one winner. One proxy process takes all requests here, so a lock in it is enough."""


def _configure(folder: Path, ports: dict[str, int], keys: tuple[str, str]) -> None:
    account, user = keys[0].split(":")
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = retune\nswift_hash_path_prefix = tests\n"
        "[storage-policy:0]\nname = single\npolicy_type = replication\ndefault = yes\n"
    )
    (folder / "serial_create.py").write_text(_SERIAL_CREATE)
    for name in SERVERS:
        # Long timeouts: a loaded machine must not look like a broken server. Above all, an update of a container's listing that
        # is late is left to a daemon that does not run here.
        common = f"""
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {ports[name]}
workers = 0
user = {getpass.getuser()}
swift_dir = {folder}
devices = {folder / "devices"}
mount_check = false
disable_fallocate = true
node_timeout = 60
conn_timeout = 10
container_update_timeout = 60
recon_cache_path = {folder}
[filter:healthcheck]
use = egg:swift#healthcheck
"""
        if name == "proxy":
            rest = f"""
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck proxy-logging serial-create s3api tempauth copy slo dlo proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 60
recoverable_node_timeout = 60
conn_timeout = 10
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{user} = {keys[1]} .admin .reseller_admin
[filter:serial-create]
paste.filter_factory = serial_create:filter_factory
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
max_bucket_listing = 50
"""
            for one in ("catch_errors", "gatekeeper", "proxy_logging", "copy", "slo", "dlo"):
                rest += f"[filter:{one.replace('proxy_', 'proxy-')}]\nuse = egg:swift#{one}\n"
        else:
            rest = f"[pipeline:main]\npipeline = healthcheck {name}-server\n[app:{name}-server]\nuse = egg:swift#{name}\n"
        (folder / f"{name}.conf").write_text(common + rest)
