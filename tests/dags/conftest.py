"""One parse of the project's own DAGs for all tests."""

import os
from typing import Any

import pytest
from parsing import ROOT, parse


@pytest.fixture(scope="session")
def airflow_environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("airflow")
    return {
        **os.environ,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("src", "dags", "plugins")),
        "RETUNE_PROJECT": str(ROOT),
    }


@pytest.fixture(scope="session")
def parsed(airflow_environ: dict[str, str]) -> dict[str, Any]:
    return parse(airflow_environ)
