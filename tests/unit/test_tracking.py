"""Runs are found by key and reopened; nothing is doubled by a retry. On a real MLflow database."""

from pathlib import Path

import pytest

from retune.tracking import Tracker

CURVE = [
    {"step": 0, "epoch": 0, "validation_loss": 1.5},
    {"step": 1, "epoch": 1, "train_loss": 1.4, "learning_rate": 0.01},
    {"step": 2, "epoch": 1, "train_loss": 1.2, "validation_loss": 1.1, "learning_rate": 0.02},
]


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}", "ticket_priority")


def test_a_key_has_one_run_whatever_is_retried(tracker: Tracker) -> None:
    first = tracker.open("run 'quoted' 1", "first", {"a": "1"})
    tracker.close(first, "FAILED")
    again = tracker.open("run 'quoted' 1", "first", {"a": "2"})
    run = tracker.client.get_run(first)
    assert again == first
    assert (run.info.status, run.data.tags["a"]) == ("RUNNING", "2")
    assert tracker.open("another", "second", {}) != first


def test_a_trial_is_nested_in_its_run(tracker: Tracker) -> None:
    parent = tracker.open("parent", "parent", {})
    child = tracker.open("parent/1", "trial", {}, parent)
    assert tracker.client.get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_closing_says_how_the_block_ended(tracker: Tracker) -> None:
    run_id = tracker.open("closing", "closing", {})
    with pytest.raises(ValueError, match="boom"), tracker.closing(run_id):
        raise ValueError("boom")
    assert tracker.client.get_run(run_id).info.status == "FAILED"
    with tracker.closing(tracker.open("closing", "closing", {}), done=False):
        pass
    assert tracker.client.get_run(run_id).info.status == "RUNNING"
    with tracker.closing(run_id):
        pass
    assert tracker.client.get_run(run_id).info.status == "FINISHED"


def test_a_curve_is_logged_once(tracker: Tracker) -> None:
    run_id = tracker.open("curve", "curve", {})
    tracker.curve(run_id, CURVE)
    tracker.curve(run_id, CURVE)
    history = tracker.client.get_metric_history(run_id, "validation_loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.5), (2, 1.1)]
    assert [(m.step, m.value) for m in tracker.client.get_metric_history(run_id, "train_loss")] == [(1, 1.4), (2, 1.2)]


def test_the_dataset_carries_dvcs_digest(tracker: Tracker) -> None:
    run_id = tracker.open("data", "data", {})
    tracker.dataset(run_id, "ticket_priority", "d" * 32 + ".dir", {"md5": "d" * 32}, 10, "training")
    (entry,) = tracker.client.get_run(run_id).inputs.dataset_inputs
    assert entry.dataset.digest == "d" * 32 + ".dir"


def test_nested_parameters_become_dotted(tracker: Tracker) -> None:
    run_id = tracker.open("params", "params", {})
    tracker.params(run_id, {"tune": {"seed": 1, "init": {"text": "x"}}})
    tracker.params(run_id, {"tune": {"seed": 1}})
    assert tracker.client.get_run(run_id).data.params == {"tune.seed": "1", "tune.init.text": "x"}


def test_a_table_shows_in_mlflow(tracker: Tracker, tmp_path: Path) -> None:
    import mlflow
    import pandas as pd

    run_id = tracker.open("table", "table", {})
    tracker.table(run_id, pd.DataFrame({"id": ["1:1"], "p": [0.5]}), "predictions.json")
    mlflow.set_tracking_uri(tracker.client.tracking_uri)
    mlflow.set_experiment(tracker.experiment)
    shown = mlflow.load_table("predictions.json", run_ids=[run_id])
    assert shown.to_dict("records") == [{"id": "1:1", "p": 0.5}]
