"""`retune rate` on a real MLflow database."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from retune.cli import app
from retune.evaluation.sample import Sample
from retune.tasks.page import SAMPLE
from retune.tracking import Tracker

PROMPT = """
name: p
task: generation
base_model: {path: model, sha256: %s}
source: landing
template: "{text}"
target: answer
""" % ("a" * 64)  # fmt: skip
RELEASES = {"candidate": "c" * 64, "champion": "d" * 64}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "p.yaml").write_text(PROMPT)
    monkeypatch.setenv("RETUNE_PROJECT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def sample(client: MlflowClient) -> Sample:
    tracker = Tracker(client.tracking_uri, "p")
    run = tracker.open("run", "run", {})
    sample = Sample("p", run, *RELEASES.values(), (("1:1", "candidate"), ("1:2", "champion")))
    tracker.json(run, sample.to_json(), SAMPLE)
    tracker.close(run)
    return sample


def call(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, ["rate", *arguments], input=stdin)


def file(tmp_path: Path, sample: Sample, *ratings: tuple[str, str, str], **fields) -> str:
    path = tmp_path / "ratings.json"
    rows = [{"id": row, "a": a, "b": b, "comment": ""} for row, a, b in ratings]
    path.write_text(json.dumps({"format": 1, "prompt": "p", "run": sample.run, **RELEASES, "ratings": rows, **fields}))
    return str(path)


def test_ratings_are_kept_beside_the_run_by_person_and_the_later_ones_count(tmp_path, client, sample) -> None:
    first = call("p", file(tmp_path, sample, ("1:1", "good", "bad"), ("1:2", "bad", "good")), "--by", "anna", "--json")
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert told["own"] == {
        "rated_good": 1,
        "champion_rated_good": 0,
        "rated_preference": 1,
        "rated_rows": 2,
        "rated_people": 1,
    }
    assert call("p", file(tmp_path, sample, ("1:2", "good", "bad")), "--by", "ben").exit_code == 0
    replaced = call("p", "-", "--by", "anna", "--json", stdin=Path(file(tmp_path, sample, ("1:1", "acceptable", "acceptable"))).read_text())
    assert json.loads(replaced.stdout)["everyone"]["rated_people"] == 2
    kept = {
        f.path: json.loads(Path(client.download_artifacts(sample.run, f.path)).read_text())
        for f in client.list_artifacts(sample.run, "decision/ratings")
    }
    assert {Path(path).name for path in kept} == {"anna.json", "ben.json"}
    assert kept["decision/ratings/anna.json"]["ratings"] == [
        {"id": "1:1", "candidate": "acceptable", "champion": "acceptable", "comment": ""}
    ]
    assert kept["decision/ratings/anna.json"]["candidate"] == RELEASES["candidate"]
    metrics = client.get_run(sample.run).data.metrics
    assert metrics == {"rated_good": 0, "champion_rated_good": 0.5, "rated_preference": -0.5, "rated_rows": 2, "rated_people": 2}


def test_people_are_told_what_was_kept(tmp_path, sample) -> None:
    done = call("p", file(tmp_path, sample, ("1:1", "good", "bad")), "--by", "anna")
    assert "anna: 1 of 2 rows; good: candidate 100%, champion 0%; preference for the candidate +1.00" in done.output
    assert sample.run in done.output


def test_what_does_not_belong_to_a_run_is_refused_and_nothing_is_kept(tmp_path, client, sample) -> None:
    other = Tracker(client.tracking_uri, "p").open("other", "other", {})
    for fields, ratings, words in [
        ({}, ("9:9", "good", "bad"), "not in the run's sample"),
        ({"run": "0" * 32}, ("1:1", "good", "bad"), "knows no run"),
        ({"run": other}, ("1:1", "good", "bad"), "not the run of a decision"),
        ({"champion": "f" * 64}, ("1:1", "good", "bad"), "champion must be"),
    ]:
        result = call("p", file(tmp_path, sample, ratings, **fields), "--by", "anna")
        assert result.exit_code == 1
        assert words in result.output
    assert "no such file" in call("p", str(tmp_path / "none.json")).output
    wrong = call("p", file(tmp_path, sample, ("1:1", "good", "bad")), "--by", "../anna")
    assert (wrong.exit_code, "--by must be" in wrong.output) == (2, True)
    assert not client.list_artifacts(sample.run, "decision/ratings")
    assert client.get_run(sample.run).data.metrics == {}
