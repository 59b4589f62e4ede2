"""`make demo`'s own command, and that every figure it wrote is true to MLflow and the ledger; then what its users do next."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from checkouts import SECRETS, Demonstrated, environment_of, run

from retune.config import load_prompt
from retune.ledger import Entry, Ledger, standing
from retune.store import open_store

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
PROMPT = "ticket_priority"


def processes_of(project: Path) -> list[str]:
    """Command lines of processes that work in or on the project."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("RETUNE_PROJECT") == str(project):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture(scope="module")
def project(demonstrated: Demonstrated) -> Iterator[Path]:
    with environment_of(demonstrated.project):
        yield demonstrated.project


@pytest.fixture(scope="module")
def report(project: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((project / ".retune/demo.json").read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def entries(project: Path) -> list[Entry]:
    return Ledger(open_store(str(project / ".retune/store")), PROMPT).entries()


@pytest.fixture(scope="module")
def stack(project: Path) -> Iterator[dict[str, Any]]:
    """Airflow and MLflow, up on what the demo left."""
    run(project, "retune.cli", "up")
    yield json.loads((project / ".retune/stack.json").read_text("utf-8"))
    run(project, "retune.cli", "down")


def test_it_leaves_nothing_running(project: Path, report: dict[str, Any]) -> None:
    assert processes_of(project) == []


def test_no_secret_of_the_environment_is_in_anything_that_was_written(project: Path, demonstrated: Demonstrated) -> None:
    """Airflow's logs and database (with XCom), MLflow's database and artifacts, the store, its ledgers, and the terminal."""
    written = [path for path in project.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.relative_to(project).as_posix() for path in written}
    assert {".retune/mlflow.db", ".retune/airflow/airflow.db"} <= names
    assert any("airflow/logs/dag_id=retrain_" in name for name in names)
    assert any(name.startswith(".retune/store/ledger/") for name in names)
    found = [(path, name) for path in written for name, secret in SECRETS.items() if secret.encode() in path.read_bytes()]
    assert found == []
    assert not any(secret in demonstrated.output for secret in SECRETS.values())


def test_two_rounds_to_two_verdicts(report: dict[str, Any], entries: list[Entry]) -> None:
    assert entries[0].kind == "found"
    assert [r["batch"] for r in report["rounds"]] == ["1", "2"]
    assert report["rounds"][0]["verdict"] == "PROMOTE"
    assert {entry.by for entry in entries} == {"asset_triggered"}, "new data started the runs, and the ledger says so"
    assert report["rounds"][1]["verdict"] in ("PROMOTE", "HOLD", "REJECT")
    first, second = (entry.body["look"] for entry in entries[1:])
    assert (first["split"] == second["split"], first["comparison"] == second["comparison"]) == (True, False)


def test_the_ledger_chain_is_whole(project: Path, entries: list[Entry]) -> None:
    for name in (PROMPT, "dataset"):
        Ledger(open_store(str(project / ".retune/store")), name).verify()


def test_every_figure_is_the_ledgers(report: dict[str, Any], entries: list[Entry]) -> None:
    for item in report["rounds"]:
        body = entries[item["ledger_entry"]].body
        assert item["verdict"] == body["decision"]["verdict"]
        assert item["reasons"] == body["decision"]["reasons"]
        assert item["comparison"] == body["decision"]["comparison"]
        assert item["metrics"]["candidate"] == body["candidate"]["metrics"]
        assert item["metrics"]["champion"] == body["champion_before"]["metrics"]
        assert item["metrics"]["baseline"] == body["baseline"]["metrics"]
        assert (item["release"], item["version"]) == (body["candidate"]["release"], body["candidate"]["version"])


def test_the_gain_over_the_template_alone_is_real(report: dict[str, Any]) -> None:
    metrics = report["rounds"][0]["metrics"]
    assert metrics["candidate"]["macro_f1"] >= metrics["baseline"]["macro_f1"] + 0.25


def test_the_rule_change_makes_the_old_champion_worse(report: dict[str, Any]) -> None:
    first, second = report["rounds"]
    assert second["metrics"]["champion"]["macro_f1"] < first["metrics"]["candidate"]["macro_f1"] - 0.03


def test_every_figure_is_mlflows(report: dict[str, Any], stack: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=stack["mlflow_url"])
    for item in report["rounds"]:
        parent = client.get_run(item["mlflow_run_id"])
        assert parent.info.status == "FINISHED"
        assert parent.data.tags["retune.verdict"] == item["verdict"]
        assert parent.data.tags["retune.dag_run_id"] == item["dag_run_id"]
        for role, metrics in item["metrics"].items():
            prefix = "" if role == "candidate" else f"{role}_"
            assert {name: parent.data.metrics[f"{prefix}{name}"] for name in metrics} == pytest.approx(metrics)
        trials = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{item['mlflow_run_id']}'")
        assert len(trials) == 2
        assert {t.info.status for t in trials} == {"FINISHED"}
        for trial in trials:
            history = client.get_metric_history(trial.info.run_id, "validation_loss")
            assert len(history) >= 3
            assert min(m.step for m in history) == 0
            assert len({(m.step) for m in history}) == len(history)
            assert trial.data.params["tune.learning_rate"]
            assert any(name.startswith("system/") for name in trial.data.metrics)
        assert item["release"] in {t.data.tags["retune.release"] for t in trials}
        (dataset,) = parent.inputs.dataset_inputs
        assert dataset.dataset.digest.endswith(".dir")
        artifacts = {a.path for a in client.list_artifacts(item["mlflow_run_id"])}
        assert artifacts >= {"predictions.parquet", "predictions.json", "decision", "dataset", "lineage.json", "prompt.yaml"}


def test_the_registry_follows_the_ledger(entries: list[Entry], stack: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=stack["mlflow_url"])
    now = standing(entries)
    assert now.champion is not None
    assert now.previous is not None
    for alias, expected in (("champion", now.champion), ("previous", now.previous)):
        version = client.get_model_version_by_alias(PROMPT, alias)
        assert (str(version.version), version.tags["retune.release"]) == (expected["version"], expected["release"])
    promoted = {e.body["champion"]["release"] for e in entries if e.kind in ("found", "promote")}
    assert len(client.search_model_versions(f"name = '{PROMPT}'")) == len(promoted)


def test_status_json_has_what_it_promises(project: Path, entries: list[Entry]) -> None:
    status = json.loads(run(project, "retune.cli", "status", "--json").stdout)
    now = standing(entries)
    assert now.champion is not None
    for name in ("champion", "previous"):
        assert set(status["prompts"][PROMPT][name]) >= {"release", "version", "since", "metrics"}
    assert status["prompts"][PROMPT]["champion"]["release"] == now.champion["release"]
    assert status["dataset"]["revision"] >= 1
    assert status["dataset"]["rows"][PROMPT] > 1000


def test_a_second_demo_shows_the_same_and_lands_nothing(project: Path, report: dict[str, Any], stack: dict[str, Any]) -> None:
    begun = time.monotonic()
    done = run(project, "retune.local.demo")
    assert time.monotonic() - begun < 60
    assert "nothing is new" in done.stdout
    again = json.loads((project / ".retune/demo.json").read_text("utf-8"))
    assert again["rounds"] == report["rounds"]
    assert run(project, "retune.cli", "status").returncode == 0  # beside a running stack, which stays up
    assert processes_of(project) != []


def test_a_forced_run_restores_every_stage_and_registers_nothing(project: Path, stack: dict[str, Any], entries: list[Entry]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=stack["mlflow_url"])
    versions = len(client.search_model_versions(f"name = '{PROMPT}'"))
    done = run(project, "retune.cli", "run", PROMPT, "--force", "--reason", "restore all", "--json", check=False)
    last = Ledger(open_store(str(project / ".retune/store")), PROMPT).entries()[-1]
    assert done.returncode == 0, done.stdout + done.stderr
    assert last.n == len(entries)
    assert last.body["look"] in (None, entries[-1].body["look"]), "what was compared before spends no look"
    assert last.body["triggered"]["reason"] == "restore all"
    assert (last.by, last.body["triggered"]["run_type"]) == ("admin", "manual")
    assert len(client.search_model_versions(f"name = '{PROMPT}'")) <= versions + 1
    parent = last.body["mlflow_run_id"]
    trials = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {t.data.tags["retune.restored"] for t in trials} == {"true"}
    assert all(client.get_metric_history(t.info.run_id, "validation_loss") for t in trials)


def test_predict_agrees_with_the_pipeline_in_an_environment_without_retune(
    project: Path, stack: dict[str, Any], tmp_path: Path, entries: list[Entry]
) -> None:
    """The version's own requirements alone, another folder, a fresh process: the same predictions as the pipeline's."""
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=stack["mlflow_url"])
    mlflow.set_tracking_uri(stack["mlflow_url"])
    promoted = next(e for e in reversed(entries) if e.kind == "promote")
    expected_file = client.download_artifacts(promoted.body["mlflow_run_id"], "predictions.parquet", str(tmp_path))
    expected = pd.read_parquet(expected_file).head(50)
    requirements = Path(mlflow.artifacts.download_artifacts(f"models:/{PROMPT}@champion/requirements.txt", dst_path=str(tmp_path)))
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    torch = [line for line in requirements.read_text().splitlines() if line.startswith("torch==")]
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *torch], check=True)
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([str(uv), "pip", "install", "-q", "--python", str(python), "-r", str(requirements)], check=True)
    rows = _texts(project, expected, entries)
    rows.to_json(tmp_path / "rows.json", orient="records")
    program = (
        "import json, sys, pandas as pd, mlflow\n"
        "try:\n    import retune\n    raise SystemExit('retune is installed here')\nexcept ImportError:\n    pass\n"
        f"model = mlflow.pyfunc.load_model('models:/{PROMPT}@champion')\n"
        "frame = pd.read_json('rows.json', orient='records', dtype=False)\n"
        "model.predict(frame).to_json('out.json', orient='records')\n"
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RETUNE_PROJECT")}
    environ |= {"MLFLOW_TRACKING_URI": stack["mlflow_url"], "RETUNE_BASE_MODELS": str(project / "examples")}
    done = subprocess.run([str(python), "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    got = pd.read_json(tmp_path / "out.json", orient="records", dtype=False)
    assert list(got["prediction"]) == list(expected["prediction"])
    for column in [c for c in expected.columns if c.startswith("p_")]:
        assert list(got[column]) == pytest.approx(list(expected[column]), abs=1e-5)
    environ["RETUNE_BASE_MODELS"] = str(tmp_path)
    failed = subprocess.run([str(python), "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert failed.returncode != 0
    assert load_prompt(project / f"prompts/{PROMPT}.yaml").base_model.sha256 in failed.stderr
    assert "RETUNE_BASE_MODELS" in failed.stderr


def _texts(project: Path, expected: pd.DataFrame, entries: list[Entry]) -> pd.DataFrame:
    """The texts of test rows, from the dataset that the promoted run evaluated on."""
    import io

    from retune.records import Lineage
    from retune.settings import Settings
    from retune.workspace import Workspaces

    promoted = next(e for e in reversed(entries) if e.kind == "promote")
    workspaces = Workspaces(Settings.load())
    data = workspaces.read(Lineage.from_json(promoted.body["lineage"]), f"artifacts/{PROMPT}/dataset/test.parquet")
    test = pd.read_parquet(io.BytesIO(data)).set_index("id")
    return test.loc[list(expected["id"]), ["text"]].reset_index(drop=True)
