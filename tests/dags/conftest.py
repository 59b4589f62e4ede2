"""The DAGs as Airflow's own parser sees them, in a process of their own: what they import stays visible."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PARSE = """
import json, sys, time
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
        "mapped": mapped,
        "timeout": t.execution_timeout.total_seconds() if t.execution_timeout else None,
        "rules": [[r.exception_path, r.action.value] for r in t.retry_policy.rules] if t.retry_policy else [],
        "on_failure": [type(c).__name__ for c in (t.on_failure_callback or [])],
        "outlets": sorted(getattr(o, "uri", "") for o in (getattr(t, "outlets", None) or t.partial_kwargs.get("outlets", []))) if not mapped else [],
        "map_index_template": t.map_index_template,
    }
heavy = ("torch", "transformers", "mlflow", "pandas", "dvc")
print("RESULT" + json.dumps({
    "errors": bag.import_errors,
    "heavy": sorted(m for m in sys.modules if m in heavy),
    "seconds": {s.file: s.duration.total_seconds() for s in bag.dagbag_stats},
    "dags": {d.dag_id: {
        "tasks": {t.task_id: task(t) for t in d.tasks},
        "timetable": type(d.timetable).__name__,
        "summary": d.timetable.summary,
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


@pytest.fixture(scope="session")
def airflow_environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("airflow")
    return {
        **os.environ,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "dags"), str(ROOT / "plugins")]),
        "RETUNE_PROJECT": str(ROOT),
    }


@pytest.fixture(scope="session")
def parsed(airflow_environ: dict[str, str]) -> dict[str, Any]:
    return parse(airflow_environ)
