"""What the commands share: options, output for people and for programs."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retune.errors import RetuneError
from retune.settings import without_password

if TYPE_CHECKING:
    from rich.console import Console

    from retune.local.record import Stack
    from retune.settings import Settings

__all__ = ["AsJson", "ShowCommand", "console", "emit", "figures", "places", "plain", "reach_mlflow", "shell", "stack_or_error", "when"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
ShowCommand = Annotated[bool, typer.Option("--show-command", help="Print the plain command that this stands for, and do nothing.")]


def console(stderr: bool = False) -> "Console":
    """For people. Lines are not wrapped where a program reads them."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if terminal else 200, soft_wrap=not terminal)


def emit(value: Any) -> None:
    """For programs."""
    plain(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def plain(text: str) -> None:
    """Text as it is: no wrapping, no markup."""
    sys.stdout.write(text + "\n")


def shell(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """A command line that can be pasted into a shell."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in (environment or {}).items()), *map(shlex.quote, words)])


def stack_or_error(settings: "Settings") -> "Stack":
    """Raises RetuneError with the way out if the stack does not run."""
    from retune.local import running

    stack = running(settings)
    if stack is None:
        raise RetuneError(f"the stack of {settings.home} is not running; start it with `retune up`")
    return stack


def reach_mlflow(settings: "Settings") -> None:
    """Points this process at the MLflow server that the stack or the environment names. Raises RetuneError if there is none."""
    defaults: dict[str, Any] = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        defaults["MLFLOW_TRACKING_URI"] = stack_or_error(settings).mlflow_url
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def when(moment: str) -> str:
    """An ISO 8601 time for a table, in local time."""
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M}"


def figures(metrics: Mapping[str, float]) -> str:
    """The best-known metrics, short; where they are missing, the first ones."""
    known = [name for name in ("macro_f1", "accuracy", "rougeL", "perplexity") if name in metrics] or list(metrics)[:2]
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in known)


def places(stack: "Stack") -> dict[str, Any]:
    """Where a running stack's parts are, for programs."""
    return {
        "airflow": {"url": stack.airflow_url, "user": stack.user, "password_file": stack.password_file, "home": stack.airflow_home},
        "mlflow": {"url": without_password(stack.mlflow_url), "external": stack.mlflow_external},
        "components": stack.components,
        "started_at": stack.started,
    }
