"""Settings that are refused, by name."""

from pathlib import Path

import pytest

from retune.errors import ConfigError
from retune.settings import Settings, without_password


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    return tmp_path


def price(project: Path, value: str) -> float | None:
    return Settings.load({"RETUNE_PROJECT": str(project), "RETUNE_DEVICE_HOUR_PRICE": value}).device_hour_price


def test_an_hour_has_a_price_only_where_one_is_set(project: Path) -> None:
    assert Settings.load({"RETUNE_PROJECT": str(project)}).device_hour_price is None
    assert (price(project, ""), price(project, "0"), price(project, "2.5")) == (None, 0.0, 2.5)


@pytest.mark.parametrize("value", ["free", "-1", "nan", "inf"])
def test_a_price_that_is_none_is_refused(project: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=f"RETUNE_DEVICE_HOUR_PRICE must be a number of 0 or more, .* got '{value}'"):
        price(project, value)


def test_the_pod_template_is_a_path_of_the_scheduler(project: Path) -> None:
    """A file that is missing there makes a pod without limits or volumes, so a path that depends on where somebody stands is refused."""
    assert Settings.load({"RETUNE_PROJECT": str(project)}).gpu_pod_template is None
    set_to = {"RETUNE_PROJECT": str(project), "RETUNE_GPU_POD_TEMPLATE": "/opt/retune-pods/gpu.yaml"}
    assert Settings.load(set_to).gpu_pod_template == "/opt/retune-pods/gpu.yaml"
    with pytest.raises(ConfigError, match=r"RETUNE_GPU_POD_TEMPLATE must be an absolute path, .* got 'deploy/gpu\.yaml'"):
        Settings.load(set_to | {"RETUNE_GPU_POD_TEMPLATE": "deploy/gpu.yaml"})


WORD = "hunter2" + "aQ9x"


def test_a_password_in_an_address_is_not_shown(project: Path) -> None:
    server = f"https://retune:{WORD}@mlflow.example.org/base"
    settings = Settings.load({"RETUNE_PROJECT": str(project), "MLFLOW_TRACKING_URI": server})
    assert settings.tracking_uri == server
    assert settings.mlflow_url == "https://mlflow.example.org/base", "links go to XCom, MLflow and the ledger"
    database = Settings.load({"RETUNE_PROJECT": str(project), "MLFLOW_TRACKING_URI": f"postgresql://retune:{WORD}@db:5432/mlflow"})
    assert database.mlflow_url == "postgresql://db:5432/mlflow"
    with pytest.raises(ConfigError, match="got 'https://bucket/x'"):
        Settings.load({"RETUNE_PROJECT": str(project), "RETUNE_STORE": f"https://me:{WORD}@bucket/x"})


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"postgresql+psycopg2://me:{WORD}@db/x", "postgresql+psycopg2://db/x"),
        (f"redis://:{WORD}@redis:6379/0 and amqp://u:{WORD}@mq", "redis://redis:6379/0 and amqp://mq"),
        (f"https://me:{WORD}@at@host/x", "https://host/x"),
        (f"postgresql://me:{WORD}/{WORD}@db/x", "postgresql://db/x"),
        (f"mysql+pymysql://me:1/{WORD}@db/x", "mysql+pymysql://db/x"),
        (f"https://me:{WORD}/{WORD}@host/x", "https://host/x"),
        (
            f"postgresql:///x?host=db&user=me&password={WORD}&sslmode=require",
            "postgresql:///x?host=db&user=me&password=***&sslmode=require",
        ),
        (f"mssql://db/x?PWD={WORD}", "mssql://db/x?PWD=***"),
        (f"https://host/x?X-Amz-Security-Token={WORD} and more", "https://host/x?X-Amz-Security-Token=*** and more"),
        ("http://127.0.0.1:5000/#/models/p@champion", "http://127.0.0.1:5000/#/models/p@champion"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
    ],
)
def test_what_is_left_of_an_address(address: str, shown: str) -> None:
    assert without_password(address) == shown
