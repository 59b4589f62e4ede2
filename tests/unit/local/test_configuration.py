"""The configuration of the embedded Airflow."""

import base64
import configparser

import pytest

from retune.errors import ConfigError
from retune.local.configuration import component_environment, configure, external_mlflow
from retune.local.ports import is_free


def airflow_cfg(configuration) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(configuration.airflow_home / "airflow.cfg")
    return parser


def test_everything_listens_on_loopback_at_a_free_port(settings):
    configuration = configure(settings, {})
    api = airflow_cfg(configuration)["api"]
    assert api["host"] == "127.0.0.1"
    assert configuration.airflow_url == f"http://127.0.0.1:{api['port']}" == api["base_url"]
    assert is_free(int(api["port"]))
    assert configuration.mlflow_url.startswith("http://127.0.0.1:")
    assert configuration.mlflow_url != configuration.airflow_url


def test_files_with_secrets_are_private(settings):
    configuration = configure(settings, {})
    for path in (configuration.airflow_home / "airflow.cfg", configuration.password_file, settings.home / "secrets.json"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_secrets_are_strong_and_made_once(settings):
    first = airflow_cfg(configure(settings, {}))
    password = (settings.home / "airflow" / "passwords.json").read_text()
    again = airflow_cfg(configure(settings, {}))
    assert len(first["api_auth"]["jwt_secret"]) >= 64
    assert len(base64.urlsafe_b64decode(first["core"]["fernet_key"])) == 32
    for section, key in (("api_auth", "jwt_secret"), ("core", "fernet_key"), ("api", "secret_key"), ("api", "port")):
        assert again[section][key] == first[section][key]
    assert (settings.home / "airflow" / "passwords.json").read_text() == password


def test_no_secret_is_in_the_environment_of_tasks(settings):
    configuration = configure(settings, {})
    cfg = airflow_cfg(configuration)
    values = " ".join(component_environment(settings, configuration, {}).values())
    for section, key in (("api_auth", "jwt_secret"), ("core", "fernet_key"), ("api", "secret_key")):
        assert cfg[section][key] not in values


def test_variables_for_another_deployment_do_not_reach_the_stack(settings):
    environ = {
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://production/airflow",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_CMD": "cat secret",
        "AIRFLOW__API__HOST": "0.0.0.0",
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW_CONFIG": "/elsewhere/airflow.cfg",
        "AIRFLOW__CORE__DAGS_FOLDER": "/my/dags",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    configuration = configure(settings, environ)
    env = component_environment(settings, configuration, environ)
    assert {k: v for k, v in env.items() if k.startswith("AIRFLOW")} == {
        "AIRFLOW__CORE__DAGS_FOLDER": "/my/dags",
        "AIRFLOW_HOME": str(configuration.airflow_home),
        "AIRFLOW_CONFIG": str(configuration.airflow_home / "airflow.cfg"),
    }
    assert "PYTHONDONTWRITEBYTECODE" not in env


def test_a_percent_sign_in_the_folder_survives(settings, tmp_path):
    from retune.settings import Settings

    odd = tmp_path / "100%s"
    odd.mkdir()
    (odd / "dvc.yaml").write_text("stages: {}\n")
    configuration = configure(Settings.load({"RETUNE_PROJECT": str(odd)}), {})
    assert airflow_cfg(configuration)["core"]["dags_folder"] == str(odd / "dags")


def test_an_mlflow_server_of_the_environment_is_used(settings):
    configuration = configure(settings, {"MLFLOW_TRACKING_URI": "https://mlflow.example.org/"})
    assert configuration.mlflow_external
    assert configuration.mlflow_url == "https://mlflow.example.org"


def test_a_database_is_no_mlflow_server():
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI must be http.* got 'postgresql://db/x'"):
        external_mlflow({"MLFLOW_TRACKING_URI": "postgresql://me:word@db/x"})  # pragma: allowlist secret
