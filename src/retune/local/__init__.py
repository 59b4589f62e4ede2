"""Starts and stops the embedded stack: Airflow and MLflow on this machine's loopback, for one project folder."""

from retune.local.record import Stack, running
from retune.local.stack import start, stop

__all__ = ["Stack", "running", "start", "stop"]
