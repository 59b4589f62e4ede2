"""Tells of a failed task: one line in the log, and a JSON POST to RETUNE_NOTIFY_URL where that is set.

    default_args = {"on_failure_callback": [RetuneNotifier()]}

The JSON: {"dag", "run", "task", "try", "url", "error"}; `task` ends in [3] for the mapped instance 3. A POST that fails is logged and
never raises: telling of a failure must not be one. Values of the environment's secrets and credentials in addresses are cut out.
"""

import json
import os
import re
import urllib.error
import urllib.request
from typing import Any

from airflow.sdk import BaseNotifier, Context

__all__ = ["RetuneNotifier"]

TIMEOUT = 10.0
"""Seconds for the POST."""
LONGEST = 500
"""Characters of the error that are told."""
SECRET_NAMES = re.compile(
    r"secret|password|passwd|token|api_?key|access_key|credential|fernet|_conn(_|$)|broker_url|result_backend", re.IGNORECASE
)
SHORTEST_SECRET = 6
"""A shorter value cannot be told from ordinary text."""
USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")


class RetuneNotifier(BaseNotifier):
    """Failure callback for tasks and DAGs; the address is read from the environment of the process that reports the failure."""

    def notify(self, context: Context) -> None:
        """Logs and posts. Never raises."""
        message = message_of(context)
        self.log.error("failed: %s", json.dumps(message, ensure_ascii=False))
        address = os.environ.get("RETUNE_NOTIFY_URL")
        if not address:
            return
        try:
            post(address, message)
        except (OSError, ValueError) as error:
            self.log.warning("RETUNE_NOTIFY_URL did not take the message: %s", without_secrets(f"{type(error).__name__}: {error}"))


def message_of(context: Any) -> dict[str, Any]:
    """What is told of a failure."""
    task = context.get("task_instance") or context.get("ti")
    dag = context.get("dag")
    index = getattr(task, "map_index", -1)
    error = context.get("exception") or context.get("reason") or "ended without an exception: killed, or out of memory"
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return {
        "dag": getattr(task, "dag_id", None) or getattr(dag, "dag_id", None),
        "run": context.get("run_id") or getattr(task, "run_id", None),
        "task": f"{task.task_id}{f'[{index}]' if isinstance(index, int) and index >= 0 else ''}" if task else None,
        "try": getattr(task, "try_number", None),
        "url": getattr(task, "log_url", None),
        "error": without_secrets(text)[:LONGEST],
    }


def without_secrets(text: str) -> str:
    """The text with secret values of the environment, and user names and passwords in addresses, replaced by ***."""
    values = (value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET)
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return USER_INFO.sub("***@", text)


def post(address: str, message: dict[str, Any]) -> None:
    """Raises OSError if nothing takes it, ValueError if the address is none."""
    if not address.startswith(("http://", "https://")):
        raise ValueError("RETUNE_NOTIFY_URL must be http(s)://...")
    body = json.dumps(message, ensure_ascii=False).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method="POST")  # noqa: S310 - checked above
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
        answer.read(1)
