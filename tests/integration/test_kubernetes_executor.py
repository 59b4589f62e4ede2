"""What Airflow's own KubernetesExecutor makes of the pod templates, and what the migration job of the chart's values does. No cluster.

The provider is not among the project's packages, whose start it would slow down; it is installed beside them for this test, 8 MB.
"""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy/kubernetes"
PROVIDER = (
    "apache-airflow-providers-cncf-kubernetes==10.25.0",
    "kubernetes==36.0.3",
    "kubernetes-asyncio==36.1.0",
    "durationpy==0.11",
    "oauthlib==4.0.1",
    "requests-oauthlib==2.0.0",
    "websocket-client==1.9.2",
)

BUILD = """
import json, queue, sys
from airflow.models.taskinstancekey import TaskInstanceKey
from airflow.providers.cncf.kubernetes.executors.kubernetes_executor import KubernetesExecutor
from airflow.providers.cncf.kubernetes.executors.kubernetes_executor_utils import get_base_pod_from_template
from airflow.providers.cncf.kubernetes.get_provider_info import get_provider_info
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
from kubernetes.client import ApiClient

executor = KubernetesExecutor()
executor.scheduler_job_id, executor.task_queue = "1", queue.Queue()
pods = []
for config in json.loads(sys.argv[1]):
    key = TaskInstanceKey("retrain_ticket_priority", "tune", "manual__1", 1, 0)
    executor.execute_async(key, ["python", "-m", "the.task"], "default", config)
    job = executor.task_queue.get_nowait()
    pods.append(ApiClient().sanitize_for_serialization(PodGenerator.construct_pod(
        dag_id=key.dag_id, task_id=key.task_id, run_id=key.run_id, try_number=1, map_index=0, pod_id="retrain-tune", date=None,
        namespace="airflow", scheduler_job_id="1", args=job.command, kube_image=executor.kube_config.kube_image,
        pod_override_object=job.kube_executor_config,
        base_worker_pod=get_base_pod_from_template(job.pod_template_file, executor.kube_config),
    )))
options = get_provider_info()["config"]["kubernetes_executor"]["options"]
print("RESULT" + json.dumps({"pods": pods, "options": sorted(options)}))
"""


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An Airflow of its own on SQLite, with the provider, and with the templates where they are here."""
    folder = tmp_path_factory.mktemp("kubernetes")
    packages = folder / "packages"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *PROVIDER]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        if os.environ.get("RETUNE_ALL_TIERS") == "1":
            pytest.fail(f"RETUNE_ALL_TIERS=1, but Airflow's Kubernetes provider cannot be installed: {done.stderr[-1000:]}")
        pytest.skip("Airflow's Kubernetes provider cannot be installed")
    settings = yaml.safe_load((DEPLOY / "values.yaml").read_text("utf-8"))["config"]["kubernetes_executor"]
    settings["pod_template_file"] = str(DEPLOY / "pods" / Path(settings["pod_template_file"]).name)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]),
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "KubernetesExecutor",
        **{f"AIRFLOW__KUBERNETES_EXECUTOR__{name}".upper(): value for name, value in settings.items()},
    }


@pytest.fixture(scope="module")
def made(environ: dict[str, str]) -> dict[str, Any]:
    """`options` of the executor; `pods`: that of a task without a template of its own, that of one told the GPU's as the DAGs tell it."""
    configs = [{}, {"pod_template_file": str(DEPLOY / "pods/gpu.yaml")}]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps(configs)], capture_output=True, text=True, env=environ, cwd=ROOT, timeout=300
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return found


def test_the_executor_has_the_options_that_the_values_set(made: dict[str, Any]) -> None:
    assert set(yaml.safe_load((DEPLOY / "values.yaml").read_text("utf-8"))["config"]["kubernetes_executor"]) <= set(made["options"])


def test_the_executor_makes_valid_pods_of_the_templates(made: dict[str, Any]) -> None:
    for pod in made["pods"]:
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, "1.37", strict=True)
        (container,) = pod["spec"]["containers"]
        assert container["name"] == "base"
        assert container["image"] == "registry.example.com/retune/worker:set-at-install"
        assert container["args"] == ["python", "-m", "the.task"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {"name": "HOME", "value": "/scratch"} in container["env"]
        assert pod["metadata"]["labels"]["dag_id"] == "retrain_ticket_priority"
        assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "retune"


def test_a_task_that_is_told_the_gpu_template_gets_the_gpu_and_no_other_does(made: dict[str, Any]) -> None:
    plain, gpu = (pod["spec"] for pod in made["pods"])
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert gpu["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert gpu["terminationGracePeriodSeconds"] == 120
    assert "nvidia.com/gpu" not in plain["containers"][0]["resources"]["limits"]
    assert "tolerations" not in plain


def test_the_migration_job_makes_the_pool_once(environ: dict[str, str]) -> None:
    """Its own command, on SQLite: the second run, as at an upgrade, leaves a pool as somebody has set it."""
    job = yaml.safe_load((DEPLOY / "values.yaml").read_text("utf-8"))["migrateDatabaseJob"]["args"]

    def slots(statement: str = "SELECT slots FROM slot_pool WHERE pool = 'gpu'") -> list[tuple[int]]:
        with closing(sqlite3.connect(Path(environ["AIRFLOW_HOME"]) / "airflow.db")) as database, database:
            return database.execute(statement).fetchall()

    subprocess.run(job, check=True, capture_output=True, env=environ, timeout=300)
    assert slots() == [(2,)]
    slots("UPDATE slot_pool SET slots = 7 WHERE pool = 'gpu'")
    subprocess.run(job, check=True, capture_output=True, env=environ, timeout=300)
    assert slots() == [(7,)]
