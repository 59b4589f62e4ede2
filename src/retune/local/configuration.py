"""The configuration of the embedded Airflow (`airflow.cfg`), the secrets in it, and the environment of all components.

Settings are written to the file rather than the environment: so `AIRFLOW_HOME=... airflow ...` works by hand, an `AIRFLOW__*`
variable of the caller still wins as Airflow's users expect, and no secret is in the environment of the code that tasks run.
"""

import base64
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from retune.errors import ConfigError
from retune.local.files import read_json, write_private
from retune.local.ports import LOOPBACK, choose
from retune.local.record import MARKER
from retune.settings import Settings, without_password

__all__ = ["GPU_SLOTS", "PINNED", "USER", "Configuration", "airflow_config", "component_environment", "configure", "external_mlflow"]

USER = "admin"
AIRFLOW_PORT, MLFLOW_PORT = 8080, 5000
"""Tried first; any free port otherwise."""
GPU_SLOTS = 2
"""Trials that tune at the same time on a machine without a GPU; change it in Airflow under Admin, Pools."""
PINNED = (
    ("core", "auth_manager"),
    ("core", "execution_api_server_url"),
    ("core", "executor"),
    ("core", "fernet_key"),
    ("core", "simple_auth_manager_all_admins"),
    ("core", "simple_auth_manager_passwords_file"),
    ("core", "simple_auth_manager_users"),
    ("database", "sql_alchemy_conn"),
    ("database", "sql_alchemy_conn_async"),
    ("api", "base_url"),
    ("api", "host"),
    ("api", "port"),
    ("api", "secret_key"),
    ("api", "workers"),
    ("api_auth", "jwt_private_key_path"),
    ("api_auth", "jwt_secret"),
)
"""Settings that the caller's environment cannot change: a variable meant for another deployment must neither migrate its database
nor open this stack to the network."""


@dataclass(frozen=True)
class Configuration:
    """Where a stack's parts are."""

    home: Path
    airflow_home: Path
    airflow_url: str
    mlflow_url: str
    mlflow_external: bool
    password_file: Path

    @property
    def logs(self) -> Path:
        return self.home / "logs"


def external_mlflow(environ: Mapping[str, str]) -> str | None:
    """The MLflow server that the caller's environment names, if any. Raises ConfigError if it is no server."""
    uri = environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if uri and not uri.startswith(("http://", "https://")):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI must be http(s)://... for the embedded stack, got {without_password(uri)!r}; unset it and the stack runs "
            "its own"
        )
    return uri or None


def configure(settings: Settings, environ: Mapping[str, str]) -> Configuration:
    """Chooses ports, makes secrets and password on first use, and writes `airflow.cfg`."""
    home, airflow_home = settings.home, settings.home / "airflow"
    for folder in (home, airflow_home, home / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    before = read_json(home / "ports.json") or {}
    external = external_mlflow(environ)
    airflow_port = choose(p for p in (before.get("airflow"), AIRFLOW_PORT) if p)
    mlflow_port = choose((p for p in (before.get("mlflow"), MLFLOW_PORT) if p), taken={airflow_port})
    write_private(home / "ports.json", json.dumps({"airflow": airflow_port, "mlflow": mlflow_port}))
    password_file = airflow_home / "passwords.json"
    if USER not in (read_json(password_file) or {}):
        write_private(password_file, json.dumps({USER: secrets.token_urlsafe(18)}))
    configuration = Configuration(
        home=home,
        airflow_home=airflow_home,
        airflow_url=f"http://{LOOPBACK}:{airflow_port}",
        mlflow_url=external or f"http://{LOOPBACK}:{mlflow_port}",
        mlflow_external=external is not None,
        password_file=password_file,
    )
    write_private(airflow_home / "airflow.cfg", airflow_config(settings, configuration, airflow_port, _secrets(home / "secrets.json")))
    return configuration


def _secrets(path: Path) -> dict[str, str]:
    """Keys that all components share; made once, since what is stored in Airflow's database is encrypted with one of them."""
    found = read_json(path) or {}
    wanted: dict[str, Callable[[], str]] = {
        "fernet_key": lambda: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "jwt_secret": lambda: secrets.token_urlsafe(64),
        "secret_key": lambda: secrets.token_urlsafe(32),
    }
    keys = {name: str(found[name]) if name in found else make() for name, make in wanted.items()}
    if keys != found:
        write_private(path, json.dumps(keys))
    return keys


def airflow_config(settings: Settings, configuration: Configuration, port: int, keys: Mapping[str, str]) -> str:
    """The text of airflow.cfg."""
    sections: dict[str, dict[str, object]] = {
        "core": {
            "dags_folder": settings.project / "dags",
            "plugins_folder": settings.project / "plugins",
            "load_examples": False,
            "dags_are_paused_at_creation": False,
            "executor": "LocalExecutor",
            "parallelism": (os.cpu_count() or 2) + 2,
            "execution_api_server_url": f"{configuration.airflow_url}/execution/",
            "auth_manager": "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager",
            "simple_auth_manager_users": f"{USER}:admin",
            "simple_auth_manager_all_admins": False,
            "simple_auth_manager_passwords_file": configuration.password_file,
            "fernet_key": keys["fernet_key"],
            # An edited prompt file changes its DAG; seen after min_file_process_interval, not half a minute later.
            "min_serialized_dag_update_interval": 5,
        },
        "database": {
            "sql_alchemy_conn": f"sqlite:///{configuration.airflow_home / 'airflow.db'}",
            # Done once before the components start, not by each of them.
            "check_migrations": False,
        },
        "logging": {
            "base_log_folder": configuration.airflow_home / "logs",
            "dag_processor_child_process_log_directory": configuration.airflow_home / "logs" / "dag_processor",
            "colored_console_log": False,
            "file_task_handler_new_folder_permissions": "0o700",
            "file_task_handler_new_file_permissions": "0o600",
        },
        "api": {
            "instance_name": "Retune",
            "host": LOOPBACK,
            "port": port,
            "base_url": configuration.airflow_url,
            "workers": 1,
            "secret_key": keys["secret_key"],
            "expose_config": False,
        },
        "api_auth": {"jwt_secret": keys["jwt_secret"]},
        "scheduler": {
            "scheduler_idle_sleep_time": 0.5,
            # A stack that was killed runs its interrupted tasks again about a minute after its next start, not after five.
            "task_instance_heartbeat_timeout": 60,
            "orphaned_tasks_check_interval": 30,
        },
        # 20 heartbeats, 5 s apart: a task outlives a restart of the api-server.
        "workers": {"max_failed_heartbeats": 20},
        "dag_processor": {"refresh_interval": 10, "min_file_process_interval": 30, "parsing_processes": 1},
    }
    lines = ["# Written by `retune up` at every start. To change a setting, export its AIRFLOW__SECTION__KEY variable before the start."]
    for section, values in sections.items():
        lines += ["", f"[{section}]", *(f"{key} = {str(value).replace('%', '%%')}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def component_environment(settings: Settings, configuration: Configuration, environ: Mapping[str, str]) -> dict[str, str]:
    """What every component, task and stage of the stack finds in its environment."""
    env = dict(environ)
    for section, key in PINNED:
        for suffix in ("", "_CMD", "_SECRET"):
            env.pop(f"AIRFLOW__{section}__{key}{suffix}".upper(), None)
    # Airflow and MLflow take seconds longer to start, each and every time, where Python may not keep its compiled files.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return env | {
        MARKER: str(settings.home),
        "AIRFLOW_HOME": str(configuration.airflow_home),
        "AIRFLOW_CONFIG": str(configuration.airflow_home / "airflow.cfg"),
        "MLFLOW_TRACKING_URI": configuration.mlflow_url,
        "RETUNE_PROJECT": str(settings.project),
        "RETUNE_HOME": str(settings.home),
        "RETUNE_STORE": settings.store,
        "RETUNE_CACHE": str(settings.cache),
        "RETUNE_PROMPTS": str(settings.prompts),
        "RETUNE_BASE_MODELS": os.pathsep.join(map(str, settings.base_models)),
        # `python`, `dvc` and `airflow` are this environment's, activated or not.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)]),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(filter(None, (LOOPBACK, "localhost", environ.get("NO_PROXY"))))),
        "PYTHONUNBUFFERED": "1",
        # As many threads as keep all cores busy when every slot of the pool tunes: more, and they wait for each other most of the time.
        "RETUNE_THREADS": environ.get("RETUNE_THREADS") or str(max(1, (os.cpu_count() or 1) // GPU_SLOTS)),
        # Without it, Airflow's process titles overwrite the environment in which MARKER is looked for.
        "SPT_NOENV": "1",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "DO_NOT_TRACK": "1",
        "SCARF_ANALYTICS": "false",
    }
