"""Stage tune from its files to its files, with the methods that take no step."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
import tiny

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
