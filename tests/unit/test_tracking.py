"""Runs are found by key and reopened; nothing is doubled by a retry. On a real MLflow database."""

from pathlib import Path

import pytest

from retune.tracking import Tracker, log_curve

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


def test_a_run_says_how_the_work_on_it_ended(tracker: Tracker) -> None:
    run_id = tracker.open("working", "working", {})
    with pytest.raises(ValueError, match="boom"), tracker.working(run_id):
        raise ValueError("boom")
    assert tracker.client.get_run(run_id).info.status == "FAILED"
    with tracker.working(run_id):  # a retry
        assert tracker.client.get_run(run_id).info.status == "RUNNING"
    assert tracker.client.get_run(run_id).info.status == "RUNNING"
    with tracker.working(run_id, done=True):
        pass
    assert tracker.client.get_run(run_id).info.status == "FINISHED"


def test_what_a_killed_run_left_open_is_closed_by_the_next(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "ticket_priority")
    killed = tracker.open("killed", "killed", {})
    killed_trial = tracker.open("killed/1", "trial", {}, killed)
    done = tracker.open("done", "done", {})
    tracker.close(done)
    by_hand = tracker.client.create_run(tracker.experiment_id()).info.run_id  # somebody's own run in the experiment
    assert set(tracker.close_orphans("next")) == {killed, killed_trial}
    mine = tracker.open("next", "next", {})
    my_trial = tracker.open("next/1", "trial", {}, mine)
    assert tracker.close_orphans("next") == [], "a retry of the same run keeps its own runs open"
    states = {run: tracker.client.get_run(run).info.status for run in (killed, killed_trial, done, by_hand, mine, my_trial)}
    assert states == {
        killed: "KILLED",
        killed_trial: "KILLED",
        done: "FINISHED",
        by_hand: "RUNNING",
        mine: "RUNNING",
        my_trial: "RUNNING",
    }


def test_a_restored_trial_names_the_run_that_computed_it(tracker: Tracker) -> None:
    first, second = tracker.open("computed", "computed", {}), tracker.open("restored", "restored", {})
    assert tracker.computed("ab" * 32, besides=second) is None
    tracker.tags(first, {"retune.release": "ab" * 32, "retune.restored": "false"})
    tracker.tags(second, {"retune.release": "ab" * 32, "retune.restored": "true"})
    assert tracker.computed("ab" * 32, besides=second) == first


def test_a_curve_is_logged_once(tracker: Tracker) -> None:
    run_id = tracker.open("curve", "curve", {})
    tracker.curve(run_id, CURVE)
    tracker.curve(run_id, CURVE)
    history = tracker.client.get_metric_history(run_id, "validation_loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.5), (2, 1.1)]
    assert [(m.step, m.value) for m in tracker.client.get_metric_history(run_id, "train_loss")] == [(1, 1.4), (2, 1.2)]


def test_a_curve_of_which_a_part_was_streamed_gets_the_rest(tracker: Tracker) -> None:
    run_id = tracker.open("part", "part", {})
    log_curve(tracker.client, run_id, CURVE[1:2])
    tracker.curve(run_id, CURVE)
    for name, steps in {"train_loss": [1, 2], "validation_loss": [0, 2], "epoch": [0, 1, 2]}.items():
        assert sorted(point.step for point in tracker.client.get_metric_history(run_id, name)) == steps


def test_a_curve_with_a_gap_is_filled(tracker: Tracker) -> None:
    """A stage that is killed after a checkpoint has not sent all that the checkpoint holds; its retry goes on from there to the end."""
    run_id = tracker.open("gap", "gap", {})
    log_curve(tracker.client, run_id, [CURVE[0], CURVE[2]])
    tracker.curve(run_id, CURVE)
    assert sorted(point.step for point in tracker.client.get_metric_history(run_id, "train_loss")) == [1, 2]


def test_a_figure_that_stands_there_is_not_logged_again(tracker: Tracker) -> None:
    run_id = tracker.open("figures", "figures", {})
    model = tracker.client.create_logged_model(tracker.experiment_id(), source_run_id=run_id).model_id
    tracker.metrics(run_id, {"a": 0.1, "b": 2.0})
    tracker.metrics(run_id, {"a": 0.1, "b": 3.0, "c": 1.0})
    tracker.metrics(run_id, {"a": 0.1}, model)
    tracker.metrics(run_id, {"a": 0.1}, model)
    assert {name: len(tracker.client.get_metric_history(run_id, name)) for name in "abc"} == {"a": 2, "b": 2, "c": 1}
    assert tracker.client.get_run(run_id).data.metrics == {"a": 0.1, "b": 3.0, "c": 1.0}
    assert [(metric.key, metric.value) for metric in tracker.client.get_logged_model(model).metrics] == [("a", 0.1)]


def test_the_curves_of_a_run_are_those_of_its_trials(tracker: Tracker) -> None:
    parent = tracker.open("with trials", "with trials", {})
    trial = tracker.open("with trials/1", "trial 1: as in the prompt file", {}, parent)
    tracker.open("with trials/2", "trial 2: seed=14", {}, parent)
    tracker.curve(trial, CURVE)
    first = [{"step": 0, "validation_loss": 1.5}, {"step": 2, "validation_loss": 1.1}]
    assert tracker.curves(parent) == {"1: as in the prompt file": first, "2: seed=14": []}


def test_artifacts_of_a_folder_are_read_without_those_below_it(tracker: Tracker) -> None:
    run_id = tracker.open("artifacts", "artifacts", {})
    assert tracker.artifacts(run_id, "decision") == {}
    for file in ("decision/a.txt", "decision/b.txt", "decision/below/c.txt"):
        tracker.text(run_id, file, file)
    assert tracker.artifacts(run_id, "decision") == {"decision/a.txt": b"decision/a.txt", "decision/b.txt": b"decision/b.txt"}


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
