"""# ingest

Takes new and changed files from every prompt's landing zone into a new dataset revision.

One task per prompt file, so that one prompt's bad file stops no other. A task ends **skipped** when nothing is new; otherwise it appends a
revision to the dataset ledger and updates the prompt's Asset, which starts `retrain_<prompt>`. Bad rows are quarantined with a reason, and
personal data is redacted before anything is versioned; the task's log has the account of each file.

Schedule: `RETUNE_INGEST_CRON` (UTC), daily at 02:00 by default. By hand: trigger it, or `retune run ingest`.
"""

import os
from datetime import timedelta

from airflow.sdk import CronTriggerTimetable, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException
from retune_dags import DEFAULT_ARGS, PROMPTS, data_asset, triggered_by


@dag(
    dag_id="ingest",
    schedule=CronTriggerTimetable(os.environ.get("RETUNE_INGEST_CRON", "0 2 * * *"), timezone="UTC"),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    dagrun_timeout=timedelta(hours=6),
    tags=["retune"],
    doc_md=__doc__,
)
def ingest():
    for prompt in PROMPTS.values():
        asset = data_asset(prompt.name)

        @task(task_id=f"ingest_{prompt.name}", outlets=[asset], doc_md=f"New files of `{prompt.source.path}` into a dataset revision.")
        def take_in(name: str, asset=asset):
            from retune.tasks.ingest import ingest

            context = get_current_context()
            revision = ingest(name, context["dag_run"].run_id, triggered_by(context))
            if revision is None:
                raise AirflowSkipException(f"nothing new for {name}")
            context["outlet_events"][asset].extra = {"revision": revision["revision"], "rows": revision["rows"]}
            return revision

        take_in(prompt.name)


ingest()
