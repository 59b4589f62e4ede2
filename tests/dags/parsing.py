"""The DAGs as Airflow's own parser sees them, in a process of their own: what they import stays visible."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

PARSE = """
import json, sys, time
sys.modules["torch"] = None  # the image of Airflow's own components has none
before = set(sys.modules)
from airflow.dag_processing.dagbag import DagBag
import pydantic, yaml
start = time.perf_counter()
bag = DagBag(dag_folder=sys.argv[1])
def task(t):
    mapped = t.is_mapped
    return {
        "downstream": sorted(t.downstream_task_ids),
        "retries": t.retries,
        "pool": t.pool,
        "queue": t.queue,
        "mapped": mapped,
        "executor": t.executor,
        "executor_config": t.executor_config,
        "timeout": t.execution_timeout.total_seconds() if t.execution_timeout else None,
        "rules": [[r.exception_path, r.action.value] for r in t.retry_policy.rules] if t.retry_policy else [],
        "on_failure": [type(c).__name__ for c in (t.on_failure_callback or [])],
        "outlets": [] if mapped else sorted(o.uri for o in t.outlets),
        "map_index_template": t.map_index_template,
    }
heavy = ("torch", "transformers", "mlflow", "pandas", "dvc", "kubernetes")
print("RESULT" + json.dumps({
    "errors": bag.import_errors,
    "heavy": sorted(m for m in heavy if sys.modules.get(m)),
    "seconds": {s.file: s.duration.total_seconds() for s in bag.dagbag_stats},
    "dags": {d.dag_id: {
        "tasks": {t.task_id: task(t) for t in d.tasks},
        "timetable": type(d.timetable).__name__,
        "cron": getattr(getattr(d.timetable, "timetable", d.timetable), "expression", None),
        "doc": bool(d.doc_md),
        "tags": sorted(d.tags),
        "max_active_runs": d.max_active_runs,
        "catchup": d.catchup,
        "params": sorted(d.params),
    } for d in bag.dags.values()},
}))
"""


def parse(environ: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(ROOT / "dags")], capture_output=True, text=True, env=environ, cwd=ROOT, timeout=120
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return result
