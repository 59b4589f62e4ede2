"""Exit code 0 if a component is well: the health checks of docker-compose.yml, which run every few seconds and so import little.

python -m retune.production.health URL            the address answers with success
python -m retune.production.health URL COMPONENT  and Airflow's health report there says so of the component
python -m retune.production.health celery NAME    the Celery worker NAME of this host takes messages
"""

import os
import socket
import sys

from retune.local.http import Refused, Unreachable, request

__all__ = ["main", "reported", "takes_messages"]

WITHIN = 5.0
"""Seconds."""


def reported(url: str, component: str | None = None) -> str | None:
    """What is wrong, or None."""
    try:
        report = request(url, timeout=WITHIN)
    except (Refused, Unreachable) as error:
        return str(error)
    if component is None:
        return None
    status = (report.get(component) or {}).get("status") if isinstance(report, dict) else None
    return None if status == "healthy" else f"{component} is {status or 'not in the report'}"


def takes_messages(name: str, broker: str) -> str | None:
    """What is wrong, or None. Celery's own command does the same, and imports Airflow for it: 3 s of a processor each time."""
    from celery import Celery
    from kombu.exceptions import OperationalError

    worker = f"{name}@{socket.gethostname()}"
    try:
        answers = Celery(broker=broker).control.ping(destination=[worker], timeout=WITHIN)
    except OperationalError as error:
        return f"no broker: {error}"
    return None if answers else f"{worker} does not answer"


def main(what: str, name: str | None = None) -> int:
    wrong = takes_messages(name or "", os.environ["AIRFLOW__CELERY__BROKER_URL"]) if what == "celery" else reported(what, name)
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
