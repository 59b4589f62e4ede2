"""The demo's reading of the ledgers; `make demo` itself is in tests/integration."""

import json

import pytest

from retune.ledger import Ledger
from retune.local import demo
from retune.store import open_store

PROMPT_FILE = f"""
name: {{name}}
task: generation
base_model: {{{{path: model, sha256: {"a" * 64}}}}}
source: landing/{{name}}
template: "{{{{text}}}}"
target: answer
"""


@pytest.fixture
def project(settings, monkeypatch):
    for name, batches in ((demo.PROMPT, demo.BATCHES), (demo.SECOND_PROMPT, demo.SECOND_BATCH)):
        (settings.prompts / f"{name}.yaml").write_text(PROMPT_FILE.format(name=name))
        for batch in batches:
            folder = settings.project / "examples" / "batches" / name / batch
            folder.mkdir(parents=True)
            (folder / f"{batch}.csv").write_text("text,answer\n")
    monkeypatch.setattr(demo, "take_in", lambda name, *_: {"revision": 7, "rows": 3} if name == demo.SECOND_PROMPT else pytest.fail(name))
    monkeypatch.setenv("RETUNE_PROJECT", str(settings.project))
    for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_PROMPTS", "KEEP"):
        monkeypatch.delenv(name, raising=False)
    return settings


def play(settings, batches: int) -> None:
    """What a run of the DAGs leaves in the ledgers."""
    store = open_store(settings.store)
    dataset, prompt = Ledger(store, "dataset"), Ledger(store, demo.PROMPT)
    revision = decision = None
    for number in range(1, batches + 1):
        objects = {demo.PROMPT: {f"{n}.csv": {} for n in range(1, number + 1)}}
        revision = dataset.append("revision", "t", "files", {"data": "", "rows": {demo.PROMPT: 10 * number}, "objects": objects}, revision)
        body = {
            "dag_run_id": f"run-{number}",
            "mlflow_run_id": f"mlflow-{number}",
            "dataset_revision": revision.n,
            "candidate": {"release": "c" * 64, "version": str(number), "metrics": {"macro_f1": 0.8, "accuracy": 0.9}},
            "champion_before": {"release": "b" * 64, "version": "0", "metrics": {"macro_f1": 0.4, "accuracy": 0.5}},
            "baseline": {"release": "a" * 64, "metrics": {"macro_f1": 0.2, "accuracy": 0.3}},
            "few_shot": {"release": "f" * 64, "metrics": {"macro_f1": 0.31, "accuracy": 0.4}},
            "decision": {"verdict": "PROMOTE", "reasons": ["better by 0.4"], "gates": [], "comparison": {"gain": 0.4}},
            "champion": {"release": "c" * 64, "version": str(number), "metrics": {}},
        }
        decision = prompt.append("promote", "t", "better by 0.4", body, decision)


def test_a_second_demo_shows_the_earlier_verdicts_and_starts_nothing(project, monkeypatch, capsys):
    play(project, 2)
    monkeypatch.setattr(demo, "start", lambda *_: pytest.fail("nothing is to be started"))
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert "nothing is new" in shown
    assert shown.count("better by 0.4") == 2
    rounds = json.loads((project.home / "demo.json").read_text())["rounds"]
    assert [(r["batch"], r["dataset_revision"], r["rows"], r["verdict"], r["version"]) for r in rounds] == [
        ("1", 0, 10, "PROMOTE", "1"),
        ("2", 1, 20, "PROMOTE", "2"),
    ]
    assert list(rounds[0]["metrics"]) == ["baseline", "few_shot", "champion", "candidate"]
    assert [line.split()[1] for line in shown.splitlines() if line.split()[:1] == ["few-shot"]] == ["0.310"] * 2
    assert rounds[0]["metrics"]["champion"] == {"macro_f1": 0.4, "accuracy": 0.5}
    assert set(rounds[0]) == {
        *("batch", "dataset_revision", "rows", "dag_run_id", "mlflow_run_id", "verdict", "reasons", "metrics"),
        *("release", "version", "ledger_entry", "comparison", "seconds"),
    }


def test_a_demo_that_was_interrupted_plays_the_missing_round_alone(project, monkeypatch, capsys):
    play(project, 1)
    played = []
    monkeypatch.setattr(
        demo, "start", lambda *_: (type("S", (), {"airflow_url": "", "user": "", "password_file": "", "mlflow_url": ""}), True)
    )
    monkeypatch.setattr(demo, "stop", lambda _: played.append("stop"))
    monkeypatch.setattr(demo._Demo, "play", lambda _, batch: played.append(batch))
    assert demo.main() == 0
    assert played == ["2", "stop"]
    assert f"dataset revision 7: 3 rows of {demo.SECOND_PROMPT}" in capsys.readouterr().out
    assert (project.project / "landing" / demo.SECOND_PROMPT / "1.csv").is_file()


def test_what_runs_already_is_left_running(project, monkeypatch, capsys):
    word = "hunter2"  # pragma: allowlist secret
    stack = type("S", (), {"airflow_url": "", "user": "", "password_file": "", "mlflow_url": f"https://me:{word}@mlflow.example.org"})
    monkeypatch.setattr(demo, "running", lambda _: stack)
    monkeypatch.setattr(demo, "start", lambda *_: (stack, False))
    monkeypatch.setattr(demo, "stop", lambda _: pytest.fail("it was not the demo's to stop"))
    monkeypatch.setattr(demo._Demo, "play", lambda *_: None)
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert "https://mlflow.example.org" in shown
    assert word not in shown


def test_a_failed_demo_stops_what_it_started_and_ends_with_1(project, monkeypatch):
    stopped = []

    def fail(*_):
        raise demo.RetuneError("mlflow ended with exit code 1")

    monkeypatch.setattr(demo, "start", fail)
    monkeypatch.setattr(demo, "stop", lambda _: stopped.append(True))
    assert demo.main() == 1
    assert stopped == [True]
