"""Edges, schedules, retries, pools; and that parsing a DAG file stays light."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from parsing import ROOT, parse

from retune.config import Tune

RETRAIN = "retrain_ticket_priority"
EDGES = {
    "resolve": ["preprocess"],
    "preprocess": ["decide", "evaluate", "measure", "plan", "promote", "select", "tune"],
    "plan": ["tune"],
    "tune": ["select"],
    "select": ["evaluate"],
    "evaluate": ["decide", "measure", "promote"],
    "measure": ["decide", "promote"],
    "decide": ["approve", "promote"],
    "approve": ["promote"],
    "promote": [],
}


def test_all_files_parse(parsed: dict[str, Any]) -> None:
    assert parsed["errors"] == {}
    assert sorted(parsed["dags"]) == ["ingest", RETRAIN, "retrain_ticket_summary", "rollback"]


def test_a_task_reads_its_own_prompt_alone(airflow_environ: dict[str, str]) -> None:
    """As Airflow's task process parses: the name of the task's DAG is told."""
    found = parse(airflow_environ | {"_AIRFLOW_PARSING_CONTEXT_DAG_ID": RETRAIN})
    assert found["errors"] == {}
    assert sorted(found["dags"]) == ["ingest", RETRAIN, "rollback"]
    assert list(found["dags"][RETRAIN]["tasks"]) == list(EDGES)


def test_parsing_imports_nothing_heavy(parsed: dict[str, Any]) -> None:
    assert parsed["heavy"] == []


def test_each_file_parses_in_under_a_second(parsed: dict[str, Any]) -> None:
    assert parsed["seconds"]
    assert {file: seconds for file, seconds in parsed["seconds"].items() if seconds >= 1} == {}


def test_retrain_edges(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"][RETRAIN]["tasks"]
    assert {name: task["downstream"] for name, task in tasks.items()} == EDGES


def test_only_trials_and_releases_are_mapped_each_with_a_readable_name(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"][RETRAIN]["tasks"]
    assert {name: task["map_index_template"] for name, task in tasks.items() if task["mapped"]} == {
        "tune": "{{ trial_name }}",
        "evaluate": "{{ role }}",
    }


def test_model_work_runs_in_the_gpu_pool(parsed: dict[str, Any]) -> None:
    tasks = parsed["dags"][RETRAIN]["tasks"]
    assert {name for name, task in tasks.items() if task["pool"] == "gpu"} == {"tune", "evaluate", "measure"}
    assert {task["pool"] for name, task in tasks.items() if name not in ("tune", "evaluate", "measure")} == {"default_pool"}


POD = "/opt/retune-pods/gpu.yaml"
MODEL_TASKS = [*((RETRAIN, name) for name in ("tune", "evaluate", "measure", "promote")), ("rollback", "rollback")]
"""Those that load a model."""


def test_no_task_has_a_pod_of_its_own_unless_a_template_is_set(parsed: dict[str, Any]) -> None:
    told = {(task["executor"], str(task["executor_config"])) for dag in parsed["dags"].values() for task in dag["tasks"].values()}
    assert told == {(None, "{}")}


@pytest.mark.parametrize(
    ("executors", "named"),
    [("KubernetesExecutor", None), ("CeleryExecutor,KubernetesExecutor", "KubernetesExecutor"), ("LocalExecutor", None)],
)
def test_tasks_that_load_a_model_get_the_pod_template(airflow_environ: dict[str, str], executors: str, named: str | None) -> None:
    """LocalExecutor is what a pod of the chart's own template is told: the DAG must parse there too."""
    found = parse({**airflow_environ, "RETUNE_GPU_POD_TEMPLATE": POD, "AIRFLOW__CORE__EXECUTOR": executors})
    assert found["errors"] == {}
    assert found["heavy"] == []
    told = {
        (dag, name): (task["executor"], task["executor_config"]["pod_template_file"])
        for dag in ("ingest", RETRAIN, "rollback")
        for name, task in found["dags"][dag]["tasks"].items()
        if (task["executor"], task["executor_config"]) != (None, {})
    }
    assert told == dict.fromkeys(MODEL_TASKS, (named, POD))


def test_tasks_that_load_a_model_go_to_the_queue_of_the_setting(parsed: dict[str, Any], airflow_environ: dict[str, str]) -> None:
    assert {task["queue"] for dag in parsed["dags"].values() for task in dag["tasks"].values()} == {"default"}
    dags = parse({**airflow_environ, "RETUNE_GPU_QUEUE": "gpu"})["dags"]
    queues = {(dag, name): task["queue"] for dag, found in dags.items() for name, task in found["tasks"].items()}
    assert set(queues.values()) == {"default", "gpu"}
    assert {(dag, name) for (dag, name), queue in queues.items() if queue == "gpu" and dag in (RETRAIN, "rollback")} == set(MODEL_TASKS)


@pytest.mark.parametrize("dag", ["ingest", RETRAIN, "rollback"])
def test_bad_input_fails_at_once_and_a_passing_fault_is_retried(parsed: dict[str, Any], dag: str) -> None:
    for task in parsed["dags"][dag]["tasks"].values():
        assert task["retries"] == 2
        assert task["rules"] == [["retune.errors.BadInputError,retune.errors.ConfigError,retune.errors.IntegrityError", "fail"]]
        assert task["timeout"] is not None
        assert task["on_failure"] == ["RetuneNotifier"]


def test_ingest_has_a_task_and_an_asset_per_prompt(parsed: dict[str, Any]) -> None:
    dag = parsed["dags"]["ingest"]
    assert {name: (task["outlets"], task["downstream"]) for name, task in dag["tasks"].items()} == {
        f"ingest_{name}": ([f"x-retune://data/{name}"], []) for name in ("ticket_priority", "ticket_summary")
    }
    assert dag["cron"] == "0 2 * * *"
    assert (dag["max_active_runs"], dag["catchup"], dag["doc"]) == (1, False, True)


def test_retrain_runs_by_cron_or_by_new_data(parsed: dict[str, Any]) -> None:
    dag = parsed["dags"][RETRAIN]
    assert dag["timetable"] == "AssetOrTimeSchedule"
    assert dag["cron"] == "0 3 * * 1"
    assert (dag["max_active_runs"], dag["catchup"], dag["doc"]) == (1, False, True)
    assert dag["tags"] == ["retune", "ticket_priority"]
    settings = {name for name in dag["params"] if name.startswith("tune.")}
    assert settings == {f"tune.{field}" for field in Tune.model_fields}
    assert set(dag["params"]) - settings == {"approval", "force", "overrides", "patch", "reason", "trials"}


@pytest.mark.parametrize(
    ("schedule", "timetable"),
    [
        ({"cron": "5 4 * * *", "on_new_data": False}, "CronTriggerTimetable"),
        ({"on_new_data": True}, "AssetTriggeredTimetable"),
        ({"on_new_data": False}, "NullTimetable"),
    ],
)
def test_each_prompt_file_makes_a_dag_on_its_own_schedule(
    airflow_environ: dict[str, str], tmp_path: Path, schedule: dict[str, Any], timetable: str
) -> None:
    prompt = yaml.safe_load((ROOT / "prompts/ticket_priority.yaml").read_text("utf-8"))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**prompt, "name": "other", "schedule": schedule}), "utf-8")
    result = parse({**airflow_environ, "RETUNE_PROMPTS": str(tmp_path)})
    assert result["errors"] == {}
    assert result["dags"]["retrain_other"]["timetable"] == timetable


def test_a_wrong_prompt_file_is_named_with_all_its_errors(airflow_environ: dict[str, str], tmp_path: Path) -> None:
    prompt = yaml.safe_load((ROOT / "prompts/ticket_priority.yaml").read_text("utf-8"))
    prompt["tune"] |= {"num_virtual_tokens": 0, "learning_rate": -1}
    (tmp_path / "ticket_priority.yaml").write_text(yaml.safe_dump(prompt), "utf-8")
    errors = "\n".join(parse({**airflow_environ, "RETUNE_PROMPTS": str(tmp_path)})["errors"].values())
    assert "ticket_priority.yaml: 2 error(s)" in errors
    assert "num_virtual_tokens" in errors
    assert "learning_rate" in errors
