"""docker-compose.yml as Compose reads it: interpolated, anchors merged, short forms and defaults written out.

As much of the Compose specification as the file uses. A key of a service that is not known here is an error: what a test silently
leaves out, it does not test.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ComposeError", "ComposeFile", "Healthcheck", "Mount", "Service", "interpolate", "read_compose", "read_env"]

UNDERSTOOD = {
    *("image", "build", "command", "entrypoint", "environment", "env_file", "depends_on", "healthcheck", "restart", "volumes", "tmpfs"),
    *("ports", "expose", "working_dir", "hostname", "stop_signal", "stop_grace_period", "deploy", "scale", "secrets", "configs"),
}
ENGINES = {
    *("user", "group_add", "init", "logging", "networks", "security_opt", "cap_drop", "cap_add", "read_only", "shm_size", "pull_policy"),
    *("mem_limit", "pids_limit", "ulimits", "labels", "profiles", "extra_hosts", "devices", "gpus", "ipc", "platform"),
}
"""What only a container engine can do, or what a test of the services' own work has no use for."""


class ComposeError(Exception):
    """The file would not start: what Compose, too, would refuse."""


@dataclass(frozen=True)
class Healthcheck:
    test: tuple[str, ...]
    """The command; a shell's own arguments where the file gives a string."""
    interval: float
    timeout: float
    retries: int
    start_period: float


@dataclass(frozen=True)
class Mount:
    source: str | None
    """Name of a volume, or a path relative to the file; None: an empty folder of the container's own (tmpfs, anonymous volume)."""
    target: str
    content: str | None = None
    """Of a secret or config that is no file."""

    @property
    def is_bind(self) -> bool:
        return self.source is not None and self.source.startswith((".", "/", "~"))


@dataclass(frozen=True)
class Service:
    name: str
    image: str
    target: str | None
    """Target of the Dockerfile that the service is built from; None for an image of others."""
    build_arguments: Mapping[str, str]
    entrypoint: tuple[str, ...] | None
    command: tuple[str, ...] | None
    environment: Mapping[str, str]
    depends_on: Mapping[str, str]
    """Service -> service_started, service_healthy or service_completed_successfully."""
    healthcheck: Healthcheck | None
    restart: str
    mounts: tuple[Mount, ...]
    ports: frozenset[int]
    """Container ports that are published or exposed."""
    published: tuple[str, ...]
    """Published ports as the file writes them."""
    working_dir: str | None
    stop_signal: str
    stop_grace: float
    replicas: int


@dataclass(frozen=True)
class ComposeFile:
    folder: Path
    services: Mapping[str, Service]
    text: str
    """All strings of the services after interpolation, for whoever looks for addresses in them."""


_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*))")
_OPERATORS = (":-", ":?", ":+", "-", "?", "+")


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """`$V`, `${V}`, `${V:-default}`, `${V:?message}`, `${V:+other}`, each also without the colon (set, even if empty), and `$$`.

    Raises ComposeError with the message where a required variable is not set.
    """
    out, at = [], 0
    while found := _VARIABLE.search(text, at):
        out.append(text[at : found.start()])
        at = found.end()
        if found["escaped"]:
            out.append("$")
        elif found["plain"]:
            out.append(variables.get(found["plain"], ""))
        else:
            end = _closing(text, at)
            out.append(_braced(found["braced"], text[at:end], variables))
            at = end + 1
    return "".join([*out, text[at:]])


def _closing(text: str, at: int) -> int:
    depth = 1
    for i in range(at, len(text)):
        depth += (text[i] == "{" and text[i - 1] == "$") - (text[i] == "}")
        if not depth:
            return i
    raise ComposeError(f"no closing brace in {text!r}")


def _braced(name: str, rest: str, variables: Mapping[str, str]) -> str:
    value = variables.get(name)
    if not rest:
        return value or ""
    operator = next((o for o in _OPERATORS if rest.startswith(o)), None)
    if operator is None:
        raise ComposeError(f"not an interpolation that Compose knows: ${{{name}{rest}}}")
    given = value is not None and (value != "" or not operator.startswith(":"))
    word = rest[len(operator) :]
    if operator.endswith("-"):
        return value or "" if given else interpolate(word, variables)
    if operator.endswith("+"):
        return interpolate(word, variables) if given else ""
    if not given:
        raise ComposeError(f"required variable {name} is missing a value: {interpolate(word, variables)}")
    return value or ""


def read_env(path: Path) -> dict[str, str]:
    """An .env file: NAME=value lines, comments, quotes; variables of earlier lines are put in unless in single quotes."""
    found: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not equals or name.startswith("#"):
            continue
        value = value.strip()
        if value[:1] == "'" == value[-1:] and len(value) > 1:
            found[name.strip()] = value[1:-1]
        else:
            value = value[1:-1] if value[:1] == '"' == value[-1:] and len(value) > 1 else re.sub(r"\s+#.*", "", value)
            found[name.strip()] = interpolate(value, found)
    return found


def read_compose(path: Path, variables: Mapping[str, str]) -> ComposeFile:
    """Raises ComposeError as Compose does: a required variable that is not set, a dependency that is no service, an unknown key."""
    written = _interpolated(yaml.safe_load(path.read_text("utf-8")), variables)
    services = {name: _service(name, fields or {}, written, variables, path.parent) for name, fields in written["services"].items()}
    for service in services.values():
        for other, condition in service.depends_on.items():
            if other not in services:
                raise ComposeError(f"{service.name}: depends_on names {other}, which is no service")
            if condition == "service_healthy" and services[other].healthcheck is None:
                raise ComposeError(f"{service.name} waits for {other} to be healthy, which has no healthcheck")
    return ComposeFile(path.parent, services, "\n".join(_strings(written["services"])))


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return interpolate(value, variables)
    if isinstance(value, list):
        return [_interpolated(one, variables) for one in value]
    if isinstance(value, dict):
        # Extensions hold anchors: what they say counts where they are merged.
        return {key: one if str(key).startswith("x-") else _interpolated(one, variables) for key, one in value.items()}
    return value


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


def _service(name: str, fields: Mapping[str, Any], written: Mapping[str, Any], variables: Mapping[str, str], folder: Path) -> Service:
    if unknown := {key for key in fields if not key.startswith("x-")} - UNDERSTOOD - ENGINES:
        raise ComposeError(f"{name}: {', '.join(sorted(unknown))}: not known to this reader of Compose files")
    build = fields.get("build")
    deploy = fields.get("deploy") or {}
    published = tuple(_published(port) for port in fields.get("ports", ()))
    return Service(
        name=name,
        image=str(fields.get("image", "")),
        target=build.get("target", "") if isinstance(build, dict) else "" if build else None,
        build_arguments={k: _text(v) for k, v in (build.get("args") or {}).items()} if isinstance(build, dict) else {},
        entrypoint=_words(fields.get("entrypoint")),
        command=_words(fields.get("command")),
        environment=_environment(fields, variables, folder),
        depends_on=_dependencies(fields.get("depends_on")),
        healthcheck=_healthcheck(fields.get("healthcheck")),
        restart=str(fields.get("restart", "no")),
        mounts=(*_volumes(fields), *_given(fields, written, variables, "secrets"), *_given(fields, written, variables, "configs")),
        ports=frozenset(int(re.sub(r"/\w+$", "", str(p)).rpartition(":")[2]) for p in (*published, *fields.get("expose", ()))),
        published=published,
        working_dir=fields.get("working_dir"),
        stop_signal=str(fields.get("stop_signal", "SIGTERM")),
        stop_grace=_seconds(fields.get("stop_grace_period", "10s")),
        replicas=int(fields.get("scale") or deploy.get("replicas") or 1),
    )


def _words(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(shlex.split(value)) if isinstance(value, str) else tuple(_text(word) for word in value)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _environment(fields: Mapping[str, Any], variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    files = fields.get("env_file") or []
    for file in [files] if isinstance(files, str | dict) else files:
        place = folder / (file["path"] if isinstance(file, dict) else file)
        if place.is_file() or not isinstance(file, dict) or file.get("required", True):
            found |= read_env(place)
    given = fields.get("environment") or {}
    if isinstance(given, list):
        given = {name: value if equals else None for name, equals, value in (one.partition("=") for one in given)}
    for name, value in given.items():
        if value is not None:
            found[name] = _text(value)
        elif name in variables:  # handed through
            found[name] = variables[name]
    return found


def _dependencies(value: Any) -> dict[str, str]:
    if isinstance(value, list):
        return dict.fromkeys(value, "service_started")
    return {name: one.get("condition", "service_started") for name, one in (value or {}).items()}


def _healthcheck(value: Any) -> Healthcheck | None:
    if not value or value.get("disable"):
        return None
    test = value["test"]
    if isinstance(test, str):
        test = ["CMD-SHELL", test]
    if test[0] == "NONE":
        return None
    command = ("/bin/sh", "-c", *test[1:]) if test[0] == "CMD-SHELL" else tuple(map(_text, test[1:]))
    times = {key: _seconds(value.get(key, default)) for key, default in (("interval", "30s"), ("timeout", "30s"), ("start_period", "0s"))}
    return Healthcheck(command, times["interval"], times["timeout"], int(value.get("retries", 3)), times["start_period"])


def _seconds(value: Any) -> float:
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    parts = re.findall(r"([\d.]+)(ms|s|m|h)", str(value))
    if not parts:
        raise ComposeError(f"not a duration: {value!r}")
    return float(sum(float(number) * units[unit] for number, unit in parts))


def _published(port: Any) -> str:
    if isinstance(port, dict):
        return ":".join(str(port[key]) for key in ("host_ip", "published", "target") if port.get(key) is not None)
    return str(port)


def _volumes(fields: Mapping[str, Any]) -> list[Mount]:
    found = []
    for volume in fields.get("volumes", ()):
        if isinstance(volume, dict):
            found.append(Mount(volume.get("source") if volume["type"] != "tmpfs" else None, volume["target"]))
        else:
            source, colon, target = volume.partition(":")
            found.append(Mount(source, target.partition(":")[0]) if colon else Mount(None, source))
    tmpfs = fields.get("tmpfs") or []
    return found + [Mount(None, one.partition(":")[0]) for one in ([tmpfs] if isinstance(tmpfs, str) else tmpfs)]


def _given(fields: Mapping[str, Any], written: Mapping[str, Any], variables: Mapping[str, str], kind: str) -> list[Mount]:
    """Secrets and configs: files of the host, or content from the file itself or from a variable."""
    found = []
    for one in fields.get(kind, ()):
        reference = {"source": one} if isinstance(one, str) else one
        source = reference["source"]
        target = reference.get("target") or source
        if not target.startswith("/"):
            target = f"/run/secrets/{target}" if kind == "secrets" else f"/{target}"
        definition = written[kind][source]
        content = definition.get("content")
        if "environment" in definition:
            content = variables.get(definition["environment"], "")
        found.append(Mount(definition.get("file"), target, content))
    return found
