"""Stage tune from its files to its files: methods that take no step, a run that diverges, several processes."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from mlflow import MlflowClient

from retune.config import resolved_yaml
from retune.errors import BadInputError, ConfigError
from retune.inference import decoder
from retune.inference.predictor import Predictor
from retune.inference.release import read_release
from retune.prompt_tuning import tune
from retune.stages.tune import main

ROOT = Path(__file__).parents[3]
TRAIN, VALIDATION = pd.DataFrame(tiny.make_rows(40, 0)), pd.DataFrame(tiny.make_rows(20, 1))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a workspace lays before the stage runs."""
    for name in ("dvc.yaml", "requirements.lock", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    dataset = tmp_path / "artifacts/ticket_priority/dataset"
    dataset.mkdir(parents=True)
    TRAIN.assign(id=[f"a.csv:{i}" for i in TRAIN.index]).to_parquet(dataset / "train.parquet")
    VALIDATION.to_parquet(dataset / "validation.parquet")
    (dataset / "inputs.json").write_text(json.dumps({"data": "d" * 64}))
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "RETUNE_PROCESSES", "RETUNE_CHECKPOINT", "RETUNE_BASE_MODELS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("method", ["none", "few_shot"])
def test_a_method_that_tunes_nothing_leaves_a_release_and_one_point_of_a_curve(workspace: Path, method: str) -> None:
    base = tiny.save_base(workspace / "models/tiny")
    prompt = tiny.make_prompt(base_model=tiny.reference(base), tune={"method": method, "examples": 3})
    main(prompt)
    artifacts = workspace / "artifacts/ticket_priority"
    curve = pd.read_csv(artifacts / "curve.csv")
    assert curve[["step", "epoch"]].to_numpy().tolist() == [[0, 0]]
    assert curve[["train_loss", "learning_rate"]].isna().all(axis=None)
    release = read_release(artifacts / "release")
    assert release.inputs["environment"] == hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    assert [example["id"] for example in release.examples] == ([f"a.csv:{i}" for i in TRAIN.index] if method == "few_shot" else [])
    loss = tune(base, release.prompt, TRAIN, VALIDATION).best_validation_loss
    assert curve["validation_loss"].tolist() == pytest.approx([loss])
    assert Predictor.of(release, base).predict(VALIDATION)["prediction"].isin(prompt.labels).all()


def test_a_run_that_diverges_keeps_its_best_prompt_as_a_release_and_in_mlflow(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_base(workspace / "models/tiny")
    prompt = tiny.make_prompt(base_model=tiny.reference(base), tune={"num_virtual_tokens": 4, "validate_every": 1, "batch_size": 8})
    # A stage is a process of its own; in this one an earlier test may have left an address and an experiment.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace}/mlflow.db")
    client = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    run_id = client.create_run(client.create_experiment("e", str(workspace / "artifacts-of-mlflow"))).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    real, steps = decoder.answer_losses, []

    def fails_at_four(*arguments: Any) -> torch.Tensor:
        steps.extend([1] if torch.is_grad_enabled() else [])
        return real(*arguments) * (torch.inf if len(steps) == 4 and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(decoder, "answer_losses", fails_at_four)
    with pytest.raises(
        BadInputError, match=rf"training loss must be finite.* kept as a release: artifacts last_good/ of MLflow run {run_id}"
    ):
        main(prompt)
    release = read_release(workspace / "artifacts/ticket_priority/last_good")
    assert Predictor.of(release, base).predict(VALIDATION)["prediction"].isin(prompt.labels).all()
    shown = client.download_artifacts(run_id, "last_good", str(workspace))
    assert read_release(Path(shown)).id == release.id
    assert client.get_run(run_id).info.status == "FAILED"
    assert not (workspace / "artifacts/ticket_priority/release").exists()


def test_the_stage_starts_its_processes_and_ends_where_one_ends(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_base(workspace / "models/tiny")
    prompt = tiny.make_prompt(base_model=tiny.reference(base), tune={"num_virtual_tokens": 4, "epochs": 2, "batch_size": 8})
    artifacts = workspace / "artifacts/ticket_priority"
    (artifacts / "prompt.yaml").write_text(resolved_yaml(prompt))
    main(prompt)
    alone = pd.read_csv(artifacts / "curve.csv")
    shutil.rmtree(artifacts / "release")
    monkeypatch.setenv("RETUNE_PROCESSES", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    with pytest.raises(SystemExit) as ended:
        main(prompt)
    assert ended.value.code == 0
    together = pd.read_csv(artifacts / "curve.csv")
    assert together["step"].tolist() == alone["step"].tolist()
    assert together["train_loss"].tolist() == pytest.approx(alone["train_loss"].tolist(), rel=1e-4, nan_ok=True)
    assert Predictor.of(read_release(artifacts / "release"), base).predict(VALIDATION)["prediction"].isin(prompt.labels).all()
    monkeypatch.setenv("RETUNE_PROCESSES", "two")
    with pytest.raises(ConfigError, match="RETUNE_PROCESSES must be a whole number >= 1, got 'two'"):
        main(prompt)
