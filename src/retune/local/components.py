"""The processes of the stack: their commands, and how one knows that they are healthy."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from retune.local.configuration import Configuration
from retune.local.http import Refused, Unreachable, answers, request

__all__ = ["Component", "components", "healthy", "migrate"]


@dataclass(frozen=True)
class Component:
    name: str
    command: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside what all components have; an empty value removes a variable."""


def _airflow(configuration: Configuration, name: str, *arguments: str) -> Component:
    return Component(name, (sys.executable, "-m", "airflow", *arguments), configuration.logs / f"{name}.log")


def migrate(configuration: Configuration) -> Component:
    return _airflow(configuration, "migrate", "db", "migrate")


def components(configuration: Configuration) -> tuple[Component, ...]:
    """In the order in which they are started: what takes longest first."""
    found = [
        _airflow(configuration, "api-server", "api-server"),
        # The log servers bind all interfaces; the api-server reads the same files from disk.
        _airflow(configuration, "scheduler", "scheduler", "--skip-serve-logs"),
        _airflow(configuration, "dag-processor", "dag-processor"),
        _airflow(configuration, "triggerer", "triggerer", "--skip-serve-logs"),
    ]
    if not configuration.mlflow_external:
        found.insert(0, _mlflow(configuration))
    return tuple(found)


def _mlflow(configuration: Configuration) -> Component:
    place = urlsplit(configuration.mlflow_url)
    return Component(
        "mlflow",
        (
            *(sys.executable, "-m", "retune.local.mlflow_server", str(place.hostname), str(place.port)),
            *(f"sqlite:///{configuration.home / 'mlflow.db'}", str(configuration.home / "mlflow-artifacts")),
        ),
        configuration.logs / "mlflow.log",
        # Its background jobs serve features that Retune does not use, with a process each.
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_TRACKING_URI": ""},
    )


def healthy(configuration: Configuration, since: Mapping[str, float]) -> set[str]:
    """Names of the components that answer, or whose heartbeat is younger than their start (`since`, seconds since 1970)."""
    found = {"mlflow"} if "mlflow" in since and answers(f"{configuration.mlflow_url}/health") else set()
    try:
        report = request(f"{configuration.airflow_url}/api/v2/monitor/health", timeout=3)
    except (Refused, Unreachable):
        return found
    if report.get("metadatabase", {}).get("status") == "healthy":
        found.add("api-server")
    for name in ("scheduler", "dag-processor", "triggerer"):
        key = name.replace("-", "_")
        part = report.get(key) or {}
        beat = part.get(f"latest_{key}_heartbeat")
        if part.get("status") == "healthy" and beat and datetime.fromisoformat(beat).timestamp() >= since.get(name, float("inf")):
            found.add(name)
    return found
