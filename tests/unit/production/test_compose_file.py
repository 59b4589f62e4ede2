"""What docker-compose.yml and Dockerfile promise, as far as their text shows it. tests/integration executes the file."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from retune.production.secrets import SECRETS

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docker-compose.yml").read_text("utf-8")
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
STAGES = {name: (base, body) for base, name, body in re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S)}
WORKERS = ("worker-default", "worker-gpu")
LEEWAY, HEARTBEAT = 10, 5
"""Seconds: Airflow's own [api_auth] jwt_leeway and [workers] min_heartbeat_interval."""
VERSION = re.compile(r":v?\d+\.\d+(\.\d+)?(-\w+)*$")


def environment(name: str) -> dict[str, str]:
    return SERVICES[name].get("environment", {})


def needs(name: str) -> set[str]:
    """Every service that must have started before this one."""
    direct = SERVICES[name].get("depends_on", {})
    return set(direct).union(*(needs(other) for other in direct))


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.dev.yml"])
def test_the_file_follows_the_specification(file: str) -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    done = subprocess.run(checker, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_two_web_uis_alone_are_published_and_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api-server", "mlflow"}
    assert all(isinstance(port, str) and port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert not any("network_mode" in service or service.get("privileged") for service in SERVICES.values())


def test_every_secret_is_required_by_name_and_none_has_a_default() -> None:
    required = dict(re.findall(r"\$\{(\w+):\?([^}]*)\}", TEXT))
    assert set(required) == set(SECRETS)
    assert set(required.values()) == {"is not in .env; run `make secrets`"}
    with_default = set(re.findall(r"\$\{(\w+):?[-+]", TEXT))
    assert with_default & set(SECRETS) == set()


def test_no_password_stands_in_the_file() -> None:
    """Whatever is named like a secret comes from one, and only from one."""
    named = {
        f"{service}: {name}": value
        for service in SERVICES
        for name, value in environment(service).items()
        if re.search(r"PASSWORD|SECRET|_KEY(_ID)?$|CONN(_OBJECT_STORE)?$|RESULT_BACKEND|BROKER_URL", name)
    }
    assert len(named) > 30
    assert [name for name, value in named.items() if not set(re.findall(r"\$\{(\w+)", value)) & set(SECRETS)] == []
    assert re.findall(r"://[^$/{\s]*:[^$/{\s@]+@", TEXT) == []


def test_every_image_has_a_version() -> None:
    assert [service["image"] for service in SERVICES.values() if not VERSION.search(service["image"])] == []
    assert [base for base, _ in STAGES.values() if base not in STAGES and not VERSION.search(base)] == []
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built == {"slim", "worker", "object-store"}
    assert built < set(STAGES)


def test_nothing_runs_as_root_or_gains_rights() -> None:
    for name, service in SERVICES.items():
        user = service.get("user") or re.findall(r"^USER (\S+)", STAGES[service["build"]["target"]][1], re.M)[-1]
        assert not re.match(r"(root|0)\b", user), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_every_service_says_how_it_is_and_starts_again_when_it_dies() -> None:
    lasting = {name: service for name, service in SERVICES.items() if name != "init"}
    assert [name for name, service in lasting.items() if service["healthcheck"]["test"][0] != "CMD"] == []
    assert {service["restart"] for service in lasting.values()} == {"unless-stopped"}
    assert SERVICES["init"]["restart"] == "no"


def test_what_a_container_prints_is_kept_within_bounds() -> None:
    kept = {name: service["logging"] for name, service in SERVICES.items()}
    assert {str(how) for how in kept.values()} == {str({"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}})}


def test_the_check_of_redis_fails_where_it_answers_with_an_error() -> None:
    """Without -e, redis-cli ends with 0 when Redis is loading or refuses the password."""
    assert SERVICES["redis"]["healthcheck"]["test"][:3] == ["CMD", "redis-cli", "-e"]


def test_the_start_waits_for_health_and_for_init() -> None:
    conditions = {
        (name, condition["condition"]) for service in SERVICES.values() for name, condition in service.get("depends_on", {}).items()
    }
    assert conditions == {(name, "service_healthy") for name, _ in conditions - {("init", "service_completed_successfully")}} | {
        ("init", "service_completed_successfully")
    }
    backing = {"postgres", "redis", "object-store"}
    assert needs("init") == {"postgres", "object-store"}
    assert [name for name in set(SERVICES) - backing - {"init"} if "init" not in needs(name)] == []
    assert needs("worker-gpu") == backing | {"init", "mlflow", "api-server"}


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_cannot_reach_airflows_database_nor_sign_a_token(worker: str) -> None:
    kept = {"AIRFLOW_DB_PASSWORD", "AIRFLOW_FERNET_KEY", "AIRFLOW_JWT_SECRET", "AIRFLOW_API_SECRET_KEY", "POSTGRES_PASSWORD"}
    kept |= {"AIRFLOW_ADMIN_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_DB_PASSWORD", "MLFLOW_FLASK_SECRET_KEY"}
    handed = {name for value in environment(worker).values() for name in re.findall(r"\$\{(\w+)", value)}
    assert handed & kept == set()
    assert {"CELERY_DB_PASSWORD", "REDIS_PASSWORD"} <= handed


def test_the_keys_of_the_object_store_go_to_whoever_reads_or_writes_there() -> None:
    handed = {name for name in SERVICES if "OBJECT_STORE_SECRET_KEY" in str(environment(name))}
    assert handed == {"object-store", "init", "mlflow", "api-server", "triggerer", *WORKERS}
    assert {name for name in SERVICES if "AIRFLOW_CONN_OBJECT_STORE" in environment(name)} == {"api-server", "triggerer", *WORKERS}


def test_workers_share_no_folder_and_no_log_server_listens() -> None:
    folders = [set(SERVICES[name]["volumes"]) for name in WORKERS]
    assert all(folders)
    assert folders[0] & folders[1] == set()
    serving = {name for name in SERVICES if set(SERVICES[name].get("command", ())) & {"scheduler", "triggerer", "worker"}}
    assert serving == {"scheduler", "triggerer", *WORKERS}
    assert all("--skip-serve-logs" in SERVICES[name]["command"] for name in serving)


def test_each_queue_has_a_worker_and_the_gpus_are_one_workers() -> None:
    queues = {SERVICES[name]["command"][SERVICES[name]["command"].index("--queues") + 1]: name for name in WORKERS}
    assert queues == {"default": "worker-default", "gpu": "worker-gpu"}
    for dags in ("dag-processor", "scheduler", *WORKERS):
        assert environment(dags)["RETUNE_GPU_QUEUE"] == "${RETUNE_GPU_QUEUE:-gpu}"
    reserved = {
        name: service["deploy"]["resources"]["reservations"]["devices"] for name, service in SERVICES.items() if "deploy" in service
    }
    assert reserved == {"worker-gpu": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}


def test_a_task_may_wait_for_a_gpu_for_longer_than_a_run_may_take() -> None:
    """Airflow fails a task for good after so many times of so many seconds in the queue; a DAG run may take a day and its approval."""
    scheduler = environment("scheduler")
    waits = float(scheduler["AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT"])
    assert waits * int(scheduler["AIRFLOW__SCHEDULER__NUM_STUCK_IN_QUEUED_RETRIES"]) > 30 * 24 * 3600


def test_a_message_is_queued_anew_before_its_token_is_refused() -> None:
    """Airflow gives the token the life of `task_queued_timeout`, and `jwt_leeway` more."""
    assert float(environment("scheduler")["AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL"]) < LEEWAY


@pytest.mark.parametrize("worker", WORKERS)
def test_a_running_tasks_token_outlives_an_api_server_that_is_away(worker: str) -> None:
    """It is made anew in its last fifth, so that is what a task has left at worst when the api-server goes away."""
    patience = int(environment(worker)["AIRFLOW__WORKERS__MAX_FAILED_HEARTBEATS"]) * HEARTBEAT
    for service in ("api-server", "scheduler"):
        assert int(environment(service)["AIRFLOW__EXECUTION_API__JWT_EXPIRATION_TIME"]) / 5 > patience


def test_mlflow_takes_requests_by_the_names_that_people_and_tasks_use() -> None:
    options = dict(word.split("=", 1) for word in SERVICES["mlflow"]["command"] if "=" in word)
    assert options["--allowed-hosts"].split(",")[:3] == ["mlflow:5000", "127.0.0.1:*", "localhost:*"]
    assert environment("worker-default")["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert options["--app-name"] == "basic-auth"


def test_the_overlay_changes_services_that_are_there() -> None:
    overlay = yaml.safe_load((ROOT / "docker-compose.dev.yml").read_text("utf-8"))["services"]
    assert set(overlay) < set(SERVICES)
    assert all(service["environment"]["RETUNE_CODE_COMMIT"] == "" for service in overlay.values())


def copied(target: str) -> list[str]:
    return re.findall(r"^COPY (.+)$", STAGES[target][1], re.M)


def test_both_images_hold_the_same_code_and_all_that_a_stage_depends_on() -> None:
    assert copied("slim") == copied("worker")
    sources = {source for line in (*copied("slim"), *copied("packages")) for source in line.split()[:-1]}
    assert [source for source in sources if not (ROOT / source).exists()] == []
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"].values()
    code = {dep.split("/")[0] for stage in stages for dep in stage["do"]["deps"]} - {"data", "artifacts"}
    assert code <= sources
    assert {".dvcignore", "dvc.yaml", "dvc.lock", "data.dvc", "params.yaml"} <= sources
    ignored = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {source.split("/")[0] for source in sources} & ignored == set()


def test_the_images_are_built_from_the_lock_files_and_the_versions_of_make() -> None:
    assert "--require-hashes" in STAGES["packages"][1]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for name, variable in (("uv", "UV_VERSION"), ("torch", "TORCH_VERSION")):
        (version,) = re.findall(rf"^{variable} := (\S+)", makefile, re.M)
        assert re.findall(rf"\b{name}==(\S+)", DOCKERFILE) == [version]
    assert STAGES["worker"][0] == "packages-with-torch"
    assert STAGES["slim"][0] == "packages"
    assert "torch==" not in STAGES["packages"][1] + STAGES["slim"][1]


def test_the_production_lock_adds_to_the_main_one_and_repeats_none_of_it() -> None:
    main, more = (
        set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / file).read_text("utf-8"), re.M))
        for file in ("requirements.lock", "requirements-production.lock")
    )
    assert main & more == set()
    assert {"apache-airflow-providers-celery", "apache-airflow-providers-fab", "flask-wtf", "psycopg", "psycopg2-binary", "redis"} <= more
    assert {"celery", "kombu"} <= main


def test_an_image_without_its_commit_is_not_built() -> None:
    for target in ("slim", "worker"):
        assert 'test "${#RETUNE_CODE_COMMIT}" -eq 40' in STAGES[target][1]
        assert STAGES[target][1].index("ENV RETUNE_CODE_COMMIT=$RETUNE_CODE_COMMIT") > STAGES[target][1].index("ARG RETUNE_CODE_COMMIT")


def test_every_variable_of_the_file_is_in_the_example() -> None:
    named = set(re.findall(r"^# ([A-Z_0-9]+)=", (ROOT / ".env.example").read_text("utf-8"), re.M))
    # Set by `make images`, for the build alone.
    assert set(re.findall(r"\$\{(\w+)", TEXT)) <= named


def test_the_guide_names_the_general_settings_that_the_containers_take() -> None:
    """All others of that part of .env.example are without effect there, which nobody would notice."""
    general = set(re.findall(r"^# ([A-Z_0-9]+)=", (ROOT / ".env.example").read_text("utf-8").split("## docker-compose.yml")[0], re.M))
    taken = general & set(re.findall(r"\$\{(\w+)", TEXT)) - {"RETUNE_CODE_COMMIT"}
    guide = (ROOT / "docs/deployment.md").read_text("utf-8")
    (said,) = re.findall(r"Of the settings of Retune itself, the containers take (.*?)\.", guide, re.S)
    assert set(re.findall(r"`(\w+)`", said)) == taken
