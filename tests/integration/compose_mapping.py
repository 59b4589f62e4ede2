"""Where a container's addresses and paths are on this machine.

In a network of containers each service has a name and its own ports; here all share one loopback address. So every string of a service's
command, environment and health check is rewritten, and that is all that is changed in them:

- `postgres:5432`, and a service's name as the host of a URL, become `127.0.0.1:` and the free port that stands for that service's port;
- variables `...HOST` and `...PORT` that name a service and its port are a pair of the same kind;
- a service's own port (`8080`, `:8080`, `--port=8080`, `localhost:8080`) becomes its free port, and `0.0.0.0` becomes `127.0.0.1`;
- `localhost:` with a published port, as people of the host write it, becomes the port of the service that publishes it;
- a path of the image or of a volume (`/opt/retune/dags`) becomes the same path below the container's own folder.

Each replica of a service has ports and a folder of its own.
"""

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compose_file import ComposeFile

from retune.local.ports import LOOPBACK, is_free

__all__ = ["DEFAULT_PORTS", "Addresses", "Paths"]

DEFAULT_PORTS = {"postgres": 5432, "redis": 6379, "http": 80}
"""Of a URL that names none, and of images whose service's command names none."""
RANGE = range(20_000, 32_000)
"""Below the ports that a kernel gives to outgoing connections: a service that is stopped for a while must find its own still free."""
END = r"(?=$|[/?\s\"',;&\])]|%2F)"


@dataclass
class Addresses:
    """Free ports of this machine for the ports of the services' replicas, chosen once."""

    compose: ComposeFile
    more: Mapping[str, set[int]] = field(default_factory=dict)
    """Ports that services listen on without saying so."""

    def __post_init__(self) -> None:
        self._given: dict[tuple[str, int], int] = {}
        self._names = "|".join(sorted(map(re.escape, self.compose.services), key=len, reverse=True))
        self._ports = {name: set(service.ports) | set(self.more.get(name, ())) for name, service in self.compose.services.items()}
        for name, _, port in re.findall(rf"(?<![\w.-])({self._names})(:|%3A)(\d+){END}", self.compose.text):
            self._ports[name].add(int(port))
        self._published: dict[int, tuple[str, int]] = {}
        for name, service in self.compose.services.items():
            for published in service.published:
                *_, host, target = published.split(":") if ":" in published else (published, published)
                self._published[int(host)] = (name, int(target.partition("/")[0]))

    def port(self, service: str, port: int, replica: int = 1) -> int:
        """This machine's port for one of a replica's."""
        key = (f"{service}-{replica}", port)
        if key not in self._given:
            taken = set(self._given.values())
            self._given[key] = next(n for n in iter(lambda: random.choice(RANGE), None) if n not in taken and is_free(n))
        return self._given[key]

    def ports(self, service: str) -> set[int]:
        """Those that a service's replicas listen on, as far as the file says."""
        return self._ports[service]

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The pairs of host and port among a service's variables, rewritten."""
        found = {}
        for name, value in variables.items():
            port = f"{name.removesuffix('HOST')}PORT"
            if name.endswith("HOST") and value in self.compose.services and port in variables:
                found |= {name: LOOPBACK, port: str(self.port(value, int(variables[port])))}
        return found

    def rewritten(self, text: str, service: str, replica: int = 1) -> str:
        own = {port: self.port(service, port, replica) for port in self._ports[service]}

        def other(found: re.Match[str]) -> str:
            return f"{LOOPBACK}{found[2]}{self.port(found[1], int(found[3]))}"

        def without_port(found: re.Match[str]) -> str:
            scheme = next((name for name in DEFAULT_PORTS if name in text), "http")
            return f"{found[1]}{LOOPBACK}:{self.port(found[2], DEFAULT_PORTS[scheme])}"

        def local(found: re.Match[str]) -> str:
            port = int(found[3])
            if port in own:
                return f"{LOOPBACK}{found[2]}{own[port]}"
            if port in self._published:
                return f"{LOOPBACK}{found[2]}{self.port(*self._published[port])}"
            return found[0]

        text = re.sub(rf"(?<![\w.-])({self._names})(:|%3A)(\d+){END}", other, text)
        text = re.sub(rf"((?<!s3)://(?:[^/@\s]*@)?)({self._names}){END}", without_port, text)
        text = re.sub(rf"(?<![\w.-])(localhost|127\.0\.0\.1|0\.0\.0\.0)(:|%3A)(\d+){END}", local, text)
        if "," in text and " " not in text:  # a list of host names
            text = ",".join(re.sub(rf"^({self._names})(:\*)?$", rf"{LOOPBACK}\2", one) for one in text.split(","))
        for port, here in own.items():
            text = re.sub(rf"(^|(?<=[\s=])):{port}{END}", f"{LOOPBACK}:{here}", text)
            text = re.sub(rf"(^|(?<=[\s=])){port}(?=$|[\s;&])", str(here), text)
        return text.replace("0.0.0.0", LOOPBACK)


@dataclass(frozen=True)
class Paths:
    """A container's file system: the folder `root` of this machine, for the paths below `prefixes`."""

    root: Path
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, root: Path, paths: Iterable[str]) -> "Paths":
        return cls(root, tuple(sorted({path.rstrip("/") for path in paths} - {""}, key=len, reverse=True)))

    def rewritten(self, text: str) -> str:
        if not self.prefixes:
            return text
        names = "|".join(map(re.escape, self.prefixes))
        return re.sub(rf"(?<![\w.~%-])(?<![\w]/)({names})(?=/|$|[\s:;,\"'&?)])", lambda found: f"{self.root}{found[1]}", text)

    def place(self, path: str) -> Path:
        return self.root / path.lstrip("/")
