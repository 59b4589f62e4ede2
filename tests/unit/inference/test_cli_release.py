"""`retune check`, `explain` and `export` on a recorded release: a folder store, a tiny base model, an MLflow database, no stack."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import yaml
from typer.testing import CliRunner

from retune.cli import app
from retune.config import load_prompt, override
from retune.inference.base_model import load_base
from retune.inference.examples import example_rows
from retune.inference.predictor import Predictor
from retune.inference.release import write_release
from retune.ledger import Ledger
from retune.settings import Settings
from retune.store import open_store
from retune.tracking import Tracker

ROWS = tiny.make_rows(30)


@dataclass(frozen=True)
class Released:
    """Prompt `p` with the template alone, a tuned champion, and a release that was held and has no validation rows."""

    project: Path
    template: str
    champion: str
    held: str


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Released:
    for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_PROMPTS", "RETUNE_BASE_MODELS", "MLFLOW_TRACKING_URI", "RETUNE_STACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RETUNE_PROJECT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "prompts").mkdir()
    base = tiny.save_base(tmp_path / "models/tiny")
    raw = tiny.make_prompt(name="p", base_model=tiny.reference(base)).model_dump(mode="json")
    (tmp_path / "prompts/p.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    prompt = load_prompt(tmp_path / "prompts/p.yaml")
    store = open_store(Settings.load())
    ledger, validation = Ledger(store, "p"), pd.DataFrame(ROWS)
    ids, bodies = [], []
    for number, seed in enumerate((None, 1, 2)):
        made = override(prompt, {"tune.method": "none"}) if seed is None else prompt
        folder = tmp_path / f"releases/{number}"
        tensors = {} if seed is None else tiny.tuned(tiny.make_soft_prompt(base, seed=seed))
        ids.append(write_release(folder, made.released(), tensors, base, {}))
        bodies.append(tiny.lineage(store, folder, validation=validation if seed != 2 else validation.head(0)).to_json())
    records = [{"release": release, "version": str(number + 1), "metrics": {}} for number, release in enumerate(ids)]
    head = ledger.append("found", "t", "alone", {"champion": records[0], "lineage": bodies[0]}, None)
    head = ledger.append("promote", "t", "better", {"champion": records[1], "candidate": records[1], "lineage": bodies[1]}, head)
    ledger.append("hold", "t", "no gain", {"champion": records[1], "candidate": records[2], "lineage": bodies[2]}, head)
    return Released(tmp_path, *ids)


def call(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_explain_tells_programs_all_of_it_and_logs_to_the_run_that_tuned_the_release(released, monkeypatch):
    uri = f"sqlite:///{released.project / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker(uri, "p")
    run = tracker.open("run/trial 1", "trial 1", {"retune.release": released.champion, "retune.restored": "false"})
    tracker.close(run)
    result = call("explain", "p", "--rows", "12", "--json", "--plot", "tokens.png")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "reading 12 of 30 validation rows 6 times" in result.stderr
    assert (found["release"], found["rows"], found["validation_rows"], found["mlflow_run_id"]) == (released.champion, 12, 30, run)
    assert [token["number"] for token in found["tokens"]] == [1, 2, 3, 4]
    assert sum(token["attention"] for token in found["tokens"]) + found["text_attention"] == pytest.approx(1)
    assert [len(token["by_cosine"]) for token in found["tokens"]] == [5] * 4
    assert (released.project / "tokens.png").read_bytes().startswith(b"\x89PNG")
    assert {file.path for file in tracker.client.list_artifacts(run, "explain")} == {
        "explain/virtual_tokens.json",
        "explain/virtual_tokens.png",
    }
    logged = json.loads(Path(tracker.client.download_artifacts(run, "explain/virtual_tokens.json")).read_text())
    assert logged == {key: value for key, value in found.items() if key not in ("validation_rows", "mlflow_run_id")}
    assert tracker.client.get_run(run).info.status == "FINISHED"


def test_explain_draws_the_same_rows_every_time_and_all_of_them_where_there_are_no_more(released):
    some = [json.loads(call("explain", "p", "--rows", "10", "--json").stdout) for _ in range(2)]
    assert some[0] == some[1]
    assert json.loads(call("explain", "p", "--json").stdout)["rows"] == 30


def test_people_get_a_table_and_are_told_where_nothing_could_be_logged(released, monkeypatch):
    result = call("explain", "p", "--release", released.champion[:8], "--rows", "5")
    assert result.exit_code == 0, result.output
    assert f"p, release {released.champion[:12]}, 5 of 30 validation rows: loss " in result.stdout
    assert "nearest by cosine" in result.stdout
    assert "nothing was logged to MLflow: the stack of" in result.stderr
    assert "start it with `retune up`" in result.stderr
    uri = f"sqlite:///{released.project / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert f"no run of release {released.champion[:12]}; was it deleted?" in call("explain", "p", "--rows", "5").stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = call("explain", "p", "--rows", "5")
    assert (result.exit_code, "nothing was logged to MLflow: http://127.0.0.1:9: " in result.stderr) == (0, True)


@pytest.mark.parametrize("command", ["explain", "export"])
def test_the_template_alone_has_nothing_that_was_tuned(released, command):
    result = call(command, "p", "--release", released.template[:8])
    assert result.exit_code == 1
    assert f"release {released.template[:12]} of p has tune.method: none, the template alone: nothing was tuned" in result.output
    assert "name a release with a soft prompt with --release, see `retune releases p`" in result.output


@pytest.mark.parametrize("command", ["explain", "export"])
def test_a_few_shot_release_has_no_soft_prompt(released, command):
    prompt = override(load_prompt(released.project / "prompts/p.yaml"), {"tune.method": "few_shot"}).released()
    folder, store = released.project / "releases/few", open_store(Settings.load())
    release = write_release(folder, prompt, {}, load_base(released.project / "models/tiny"), {}, example_rows(prompt, ROWS))
    body = {
        "candidate": {"release": release, "version": None},
        "lineage": tiny.lineage(store, folder, validation=pd.DataFrame(ROWS)).to_json(),
    }
    ledger = Ledger(store, "p")
    ledger.append("hold", "t", "no gain", {**ledger.head().body, **body}, ledger.head())
    result = call(command, "p", "--release", release[:12])
    assert result.exit_code == 1
    assert f"release {release[:12]} of p has tune.method: few_shot, which tunes no soft prompt; name a release with a soft" in result.output


@pytest.mark.parametrize("command", ["explain", "export"])
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("unknown",), 2, "no prompt file"),
        (("p", "--release", "xyz"), 1, "'xyz' begins 0 releases of p"),
    ],
)
def test_what_is_not_there_is_named(released, command, arguments, code, words):
    result = call(command, *arguments)
    assert (result.exit_code, words in result.output) == (code, True)


def test_explain_refuses_an_empty_split_and_no_rows(released):
    assert "p: the validation split of its release is empty" in call("explain", "p", "--release", released.held).output
    assert call("explain", "p", "--rows", "0").exit_code == 2


def test_a_release_without_its_base_model_names_the_hash_and_the_setting(released):
    (released.project / "models/tiny/model.safetensors").unlink()
    result = call("explain", "p")
    assert result.exit_code == 1
    assert "no base model with sha256" in result.output
    assert "RETUNE_BASE_MODELS" in result.output


def test_export_writes_a_new_folder_and_says_where(released):
    result = call("export", "p", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["folder"], found["release"]) == (f"p-{released.champion[:12]}", released.champion)
    assert (released.project / found["folder"] / "README.md").is_file()
    again = call("export", "p")
    assert (again.exit_code, "--to must name a folder that does not exist yet" in again.output) == (1, True)
    elsewhere = call("export", "p", "--to", "out/here", "--release", released.held)
    assert "wrote out/here: 4 virtual tokens of 32 numbers" in elsewhere.stdout
    assert "out/here/README.md shows how" in elsewhere.stdout


def write_checks(released: Released, *checks: dict[str, Any]) -> None:
    (released.project / "prompts/p.checks.yaml").write_text(yaml.safe_dump({"checks": list(checks)}), "utf-8")


def answer(released: Released, release: str, text: str) -> str:
    """What a release says by itself, without the command under test."""
    folder = next(folder for folder in (released.project / "releases").iterdir() if sha256(folder / "manifest.json") == release)
    return Predictor.load(folder, project=released.project).predict([{"text": text}])["prediction"].iloc[0]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_check_passes_with_what_the_release_says_and_reports_what_is_not_required(released):
    said = answer(released, released.champion, "router broken")
    (other,) = {"low", "high"} - {said} if said != "medium" else {"low"}
    write_checks(
        released,
        {"name": "router", "input": {"text": "router broken"}, "equals": said, "latency_under": 60_000},
        {"input": {"text": "router broken"}, "equals": other, "required": False},
    )
    result = call("check", "p", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["prompt"], found["release"], found["passed"]) == ("p", released.champion, True)
    assert [(check["name"], check["required"], check["passed"]) for check in found["checks"]] == [
        ("router", True, True),
        ("check 2", False, False),
    ]
    assert found["checks"][1]["reason"] == f"Expected {other!r}; got {said!r}."
    table = call("check", "p")
    assert table.exit_code == 0
    assert f"p, release {released.champion[:12]}, " in table.stdout
    assert f"check 2  no        failed   Expected {other!r}; got {said!r}." in table.stdout


def test_a_required_check_that_fails_is_exit_code_1(released, tmp_path):
    write_checks(released, {"input": {"text": "router broken"}, "same_as": {"text": "router broken"}})
    assert call("check", "p").exit_code == 0
    said = answer(released, released.champion, "router broken")
    wrong = {"checks": [{"input": {"text": "router broken"}, "differs_from": {"text": "router broken"}}]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(wrong), "utf-8")
    result = call("check", "p", "--file", str(tmp_path / "other.yaml"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    assert f"Expected something else than 'router broken' gets, {said!r}; got {said!r}." in result.stdout


def test_check_takes_a_release_by_id_version_or_as_the_previous_one(released):
    write_checks(released, {"input": {"text": "a"}, "one_of": ["low", "medium", "high"]})
    for name, release in (
        ("2", released.champion),
        ("previous", released.template),
        (released.held[:12], released.held),
    ):
        result = call("check", "p", "--release", name, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["release"] == release


def test_a_prompt_that_never_changed_has_no_previous_release(tmp_path, released):
    write_checks(released, {"input": {"text": "a"}, "equals": "low"})
    shutil.rmtree(tmp_path / ".retune/store/ledger")
    result = call("check", "p", "--release", "previous")
    assert (result.exit_code, "p has had one champion only, or none" in result.output) == (1, True)
    result = call("check", "p")
    assert (result.exit_code, "the ledger of p is empty: nothing was released yet" in result.output) == (1, True)


def test_a_wrong_file_of_checks_is_exit_code_2_before_anything_is_loaded(released):
    result = call("check", "p")
    assert (result.exit_code, "no checks can be read from" in result.output) == (2, True)
    write_checks(released, {"name": "outage", "input": {"text": "a"}, "equals": "urgent"})
    result = call("check", "p")
    assert result.exit_code == 2
    assert "outage: equals: must be among the labels low, medium, high, got 'urgent'" in result.output
    assert call("check", "unknown").exit_code == 2
