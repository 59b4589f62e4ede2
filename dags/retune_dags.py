"""What the DAG files share: prompt files, assets, schedules, retries, and who is told of a failure. No DAG of its own.

The DAGs have no start date: with one, Airflow runs a cron schedule's last moment as soon as it first sees the DAG.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from airflow.sdk import (
    Asset,
    AssetOrTimeSchedule,
    Context,
    CronTriggerTimetable,
    ExceptionRetryPolicy,
    RetryAction,
    RetryRule,
    get_parsing_context,
)
from airflow.sdk.configuration import conf
from retune_notifier import RetuneNotifier

from retune.config import Prompt, load_prompt, load_prompts
from retune.errors import BadInputError, ConfigError, IntegrityError
from retune.settings import Settings

RETRAIN = "retrain_"


def _prompts(folder: Path) -> dict[str, Prompt]:
    """Every prompt by name; where a task of one prompt's DAG starts, that prompt alone: a start must not cost more with more prompts."""
    dag_id = get_parsing_context().dag_id or ""
    if dag_id.startswith(RETRAIN):
        name = dag_id.removeprefix(RETRAIN)
        return {name: load_prompt(folder / f"{name}.yaml")}
    return load_prompts(folder)


def _pod(template: str | None) -> dict[str, Any]:
    """What a task that runs a model is told on Kubernetes: the template of its pod, and the executor where it is not the only one.

    Where it is the only one nothing is named: Airflow looks the name up in the pod too, whose own executor the chart calls LocalExecutor.
    """
    if template is None:
        return {}
    named = {"executor": "KubernetesExecutor"} if "," in conf.get("core", "executor") else {}
    return {"executor_config": {"pod_template_file": template}, **named}


_SETTINGS = Settings.load()
PROMPTS = _prompts(_SETTINGS.prompts)
MODEL_PLACE = _pod(_SETTINGS.gpu_pod_template)
"""Arguments of every task that loads a model: where there are workers or pods for such tasks, they run there. An answer of another device
can differ from the measured one in a character, and a promotion compares them."""
if os.environ.get("RETUNE_GPU_QUEUE"):
    MODEL_PLACE["queue"] = os.environ["RETUNE_GPU_QUEUE"]
MODEL_WORK: dict[str, Any] = {"pool": "gpu", **MODEL_PLACE}
"""Arguments of the tasks whose work is the model's: as many at a time as the pool has slots."""

DEFAULT_ARGS: dict[str, Any] = {
    "owner": "retune",
    "retries": 2,
    "retry_delay": timedelta(seconds=20),
    "retry_policy": ExceptionRetryPolicy(
        rules=[
            RetryRule(
                exception=[BadInputError, ConfigError, IntegrityError],
                action=RetryAction.FAIL,
                reason="a retry cannot help: the message says what would",
            )
        ]
    ),
    "execution_timeout": timedelta(hours=2),
    "on_failure_callback": [RetuneNotifier()],
}


def data_asset(prompt: str) -> Asset:
    """Updated by `ingest` whenever a dataset revision changes the prompt's data; its events carry the revision.

    Airflow leaves a scheme that begins with x- alone; for any other it imports what every provider says of assets, at each task's start.
    """
    return Asset(name=f"data_{prompt}", uri=f"x-retune://data/{prompt}")


def schedule_of(prompt: Prompt) -> Any:
    """Cron, new data, either, or None: by hand alone."""
    cron = CronTriggerTimetable(prompt.schedule.cron, timezone="UTC") if prompt.schedule.cron else None
    if not prompt.schedule.on_new_data:
        return cron
    return AssetOrTimeSchedule(timetable=cron, assets=[data_asset(prompt.name)]) if cron else [data_asset(prompt.name)]


def triggered_by(context: Context) -> str:
    """The user who triggered the run, or what did (scheduled, asset_triggered)."""
    run = context["dag_run"]
    return run.triggering_user_name or run.run_type.value


def trigger_of(context: Context) -> dict[str, str]:
    """Who or what started the run and why, and where Airflow shows it: the JSON of `retune.records.Trigger`."""
    run = context["dag_run"]
    base = conf.get("api", "base_url", fallback="").rstrip("/")
    return {
        "dag_id": run.dag_id,
        "dag_run_id": run.run_id,
        "run_type": run.run_type.value,
        "by": triggered_by(context),
        "reason": context["params"].get("reason") or "",
        "url": f"{base}/dags/{run.dag_id}/runs/{quote(run.run_id, safe='')}" if base else "",
    }
