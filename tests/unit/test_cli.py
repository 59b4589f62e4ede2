"""The command line, on a folder store and without a stack."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from retune.cli import app
from retune.cli_run import overrides
from retune.config import load_prompt
from retune.errors import ConfigError
from retune.ledger import Ledger
from retune.local.record import Process, Stack
from retune.settings import Settings
from retune.store import open_store

COMMANDS = (
    *("up", "down", "status", "new", "run", "land", "releases", "ledger", "rollback", "unbar", "predict"),
    *("audit", "check", "checkout", "reproduce", "explain", "rate", "export", "forget", "gc", "doctor"),
)
PROMPT = """
name: p
task: generation
base_model: {path: model, sha256: %s}
source: landing/p
template: "{text}"
target: answer
""" % ("a" * 64)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "p.yaml").write_text(PROMPT)
    for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_PROMPTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RETUNE_PROJECT", str(tmp_path))
    return tmp_path


@pytest.fixture
def decided(project: Path) -> Path:
    """Two revisions; release a, promoted over the template, and release b, held."""
    store = open_store(str(project / ".retune" / "store"))
    dataset, prompt = Ledger(store, "dataset"), Ledger(store, "p")
    head = None
    for rows in (10, 25):
        head = dataset.append(
            "revision", "tester", "files", {"data": "outs: []", "rows": {"p": rows}, "objects": {}, "prompts_changed": ["p"]}, head
        )
    template = {"release": "0" * 64, "version": "1", "metrics": {}}
    champion = {"release": "a" * 64, "version": "2", "metrics": {"accuracy": 0.9}}
    entry = prompt.append("found", "tester", "the template alone", {"champion": template}, None)
    candidate = {"release": "a" * 64, "version": "2", "metrics": {"accuracy": 0.9}}
    entry = prompt.append(
        "promote", "tester", "better by 0.1", {"champion": champion, "candidate": candidate, "dataset_revision": 0}, entry
    )
    candidate = {"release": "b" * 64, "version": None, "metrics": {"accuracy": 0.8}}
    prompt.append("hold", "tester", "no gain", {"champion": champion, "candidate": candidate, "dataset_revision": 1}, entry)
    return project


def call(*arguments: str):
    return CliRunner().invoke(app, arguments)


def value(*arguments: str):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"retune {command}" in result.output


def test_help_comes_at_once_because_nothing_heavy_is_imported():
    code = "import sys, retune.cli\nprint([m for m in ('airflow', 'mlflow', 'torch', 'pandas', 'dvc', 'boto3') if m in sys.modules])"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - begun < 5, "0.5 s on an idle machine"


def test_status_tells_champion_previous_verdict_and_revision(decided):
    status = value("status", "--json")
    prompt = status["prompts"]["p"]
    assert prompt["champion"]["release"] == "a" * 64
    assert prompt["champion"]["version"] == "2"
    assert prompt["champion"]["metrics"] == {"accuracy": 0.9}
    assert prompt["previous"]["release"] == "0" * 64
    assert prompt["last"]["verdict"] == "hold"
    assert prompt["last"]["reason"] == "no gain"
    assert prompt["barred"] == []
    assert status["dataset"] == {"revision": 1, "rows": {"p": 25}}
    assert status["stack"]["running"] is False


def test_a_champion_is_one_since_its_promotion_not_since_the_last_entry(decided):
    promotion = value("ledger", "p", "--json")["entries"][1]
    assert value("status", "--json")["prompts"]["p"]["champion"]["since"] == promotion["at"]


def test_status_of_an_empty_project_has_no_champion(project):
    status = value("status", "--json")
    assert status["prompts"]["p"] == {"champion": None, "previous": None, "last": None, "barred": []}
    assert status["dataset"] == {"revision": None, "rows": {}}
    assert "not running" in call("status").output


def test_releases_come_newest_first_with_what_became_of_them(decided):
    listed = value("releases", "p", "--json")["releases"]
    assert [(r["release"][0], r["verdict"], r["champion"], r["previous"]) for r in listed] == [
        ("b", "hold", False, False),
        ("a", "promote", True, False),
        ("0", "found", False, True),
    ]


def test_ledger_lists_and_verifies(decided):
    assert [e["kind"] for e in value("ledger", "p", "--json")["entries"]] == ["found", "promote", "hold"]
    assert "3 entries" in call("ledger", "p", "--verify").output
    assert [e["body"]["rows"]["p"] for e in value("ledger", "dataset", "--json")["entries"]] == [10, 25]


def test_a_changed_entry_fails_verification(decided):
    entry = decided / ".retune" / "store" / "ledger" / "p" / "00000001.json"
    entry.chmod(0o600)
    entry.write_text(entry.read_text().replace("better by 0.1", "better by 0.9"))
    result = call("ledger", "p", "--verify")
    assert result.exit_code == 1
    assert "entry 1" in result.output


def test_people_get_tables(decided):
    for arguments in (("status",), ("releases", "p"), ("ledger", "p")):
        result = call(*arguments)
        assert result.exit_code == 0
        assert "hold" in result.output.lower()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("releases", "unknown"), 2, "no prompt file"),
        (("run", "unknown"), 2, "no prompt file"),
        (("run", "p"), 1, "retune up"),
        (("run", "p", "--set", "tune.nope=1"), 2, "tune.nope"),
        (("run", "p", "--set", "nonsense"), 2, "KEY=VALUE"),
        (("run", "ingest", "--force"), 2, "--force"),
        (("predict", "p", "--text", "x"), 1, "retune up"),
        (("predict", "p"), 2, "--text or --file"),
        (("land", "p", "none.csv"), 1, "no such file"),
        (("run", "ingest", "--approval"), 2, "belong to a prompt's run"),
        (("run", "p", "--ingest", "--approval"), 2, "set promote.approval: true"),
        (("checkout",), 1, "no dataset revision yet"),
        (("checkout", "--prompt", "unknown"), 2, "no prompt file"),
        (("checkout", "abc", "--data", "1"), 2, "either a release or --data"),
        (("checkout", "abc"), 1, "begins 0 releases of p"),
        (("reproduce", "p"), 1, "nothing was released"),
        (("reproduce", "p", "--release", "abc"), 1, "begins 0 releases of p"),
        (("explain", "p"), 1, "nothing was released"),
        (("explain", "p", "--rows", "0"), 2, "--rows"),
        (("export", "unknown"), 2, "no prompt file"),
        (("audit", "unknown"), 2, "no prompt file"),
        (("audit", "p"), 1, "nothing was released"),
        (("audit", "p", "--out", "history.txt"), 2, "must end in .html or .md"),
        (("new", "p", "--from", "none.csv"), 2, "--force"),
        (("new", "q", "--from", "none.csv"), 1, "no such file"),
        (("nonsense",), 2, ""),
    ],
)
def test_errors_are_one_message_and_an_exit_code(project, arguments, code, words):
    result = call(*arguments)
    assert result.exit_code == code
    assert words in result.output
    assert "Traceback" not in result.output


def test_outside_a_project_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("RETUNE_PROJECT", raising=False)
    monkeypatch.chdir(tmp_path)
    result = call("status")
    assert result.exit_code == 2
    assert "RETUNE_PROJECT" in result.output


def test_no_password_of_mlflow_is_shown(project, monkeypatch):
    word = "hunter2"  # pragma: allowlist secret
    address = f"https://me:{word}@mlflow.example.org"
    me = Process.of(os.getpid())
    Stack(me, "2026-01-01T00:00:00+00:00", "http://127.0.0.1:1", "h", "admin", "h/passwords.json", address, True, {}).save(Settings.load())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for arguments in (("up",), ("up", "--json"), ("status",), ("status", "--json"), ("predict", "p", "--text", "x", "--show-command")):
        result = call(*arguments)
        assert result.exit_code == 0
        assert "https://mlflow.example.org" in result.output
        assert word not in result.output


def test_a_file_lands_in_the_prompts_zone(project):
    (project / "new.csv").write_text("text,answer\n")
    landed = value("land", "p", str(project / "new.csv"), "--json")["files"]
    assert [f["state"] for f in landed] == ["landed"]
    assert (project / "landing" / "p" / "new.csv").read_text() == "text,answer\n"


def test_the_plain_command_of_a_run_and_a_landing_is_shown_and_nothing_is_done(project):
    shown = call("run", "p", "--set", "tune.seed=14", "--reason", "it's time", "--show-command").output
    assert "airflow dags trigger retrain_p" in shown
    assert '"tune.seed": 14' in shown
    (project / "new.csv").write_text("text,answer\n")
    assert call("land", "p", str(project / "new.csv"), "--show-command").output.startswith("cp ")
    assert not (project / "landing").exists()


@pytest.fixture
def sample(project: Path) -> Path:
    """A user's file, a base model's folder, and the list of prompts that `dvc repro` knows."""
    (project / "examples/base_model").mkdir(parents=True)
    (project / "examples/base_model/config.json").write_text("{}")
    (project / "params.yaml").write_text("# known by hand\nprompts:\n- p\n")
    path = project / "mine.csv"
    path.write_text("body,intent\n" + "".join(f"text number {n},{'ab'[n % 2]}\n" for n in range(20)))
    return path


def test_a_new_prompt_file_is_written_named_in_params_and_never_over_another(project, sample):
    found = value("new", "mine", "--from", str(sample), "--json")
    assert (found["text"], found["target"], found["task"], found["labels"]) == ("body", "intent", "classification", ["a", "b"])
    assert found["next"][0] == f"retune land mine {sample}"
    assert load_prompt(project / "prompts/mine.yaml").source.path == ".retune/landing/mine"
    assert (project / "params.yaml").read_text() == "# known by hand\nprompts:\n- p\n- mine\n"
    refused = call("new", "mine", "--from", str(sample))
    assert (refused.exit_code, "--force" in refused.output) == (2, True)
    forced = call("new", "mine", "--from", str(sample), "--text", "intent", "--target", "body", "--force")
    assert "text:   'intent' (you named it)" in forced.output
    assert load_prompt(project / "prompts/mine.yaml").task == "generation"
    assert (project / "params.yaml").read_text().count("mine") == 1


def test_a_draft_can_be_looked_at_without_writing(project, sample):
    shown = call("new", "other", "--from", str(sample), "--base-model", f"hub:org/name@{'c' * 40}", "--show")
    assert 'hub: "org/name"' in shown.output
    assert not (project / "prompts/other.yaml").exists()
    assert "other" not in (project / "params.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Bad-Name",), "PROMPT must be small letters"),
        (("q", "--base-model", "hub:org/name@main"), "full commit of 40 hex digits"),
        (("q", "--base-model", "nowhere"), "folder with config.json"),
        (("q", "--target", "label"), "--target must be one of the columns body, intent"),
    ],
)
def test_a_wrong_option_of_new_is_named_and_nothing_is_written(project, sample, arguments, words):
    result = call("new", *arguments, "--from", str(sample))
    assert result.exit_code in (1, 2)
    assert words in result.output
    assert sorted(path.name for path in (project / "prompts").iterdir()) == ["p.yaml"]


def test_down_with_nothing_running_is_fine(project):
    result = call("down")
    assert result.exit_code == 0
    assert "nothing was running" in result.output


def test_doctor_names_every_problem_with_its_way_out(project):
    result = call("doctor", "--json")
    assert result.exit_code == 1
    checks = {c["name"]: c for c in json.loads(result.stdout)["checks"]}
    assert checks["store"]["state"] == "ok"
    assert checks["base model of p"]["state"] == "fail"
    assert checks["dvc"]["state"] == "fail"
    assert all(c["way_out"] for c in checks.values() if c["state"] == "fail")


def test_override_values_are_json_or_text():
    assert overrides(["a=1e-3", "b=true", "c=words", 'd={"x": 1}', "e=a=b"]) == {
        "a": 0.001,
        "b": True,
        "c": "words",
        "d": {"x": 1},
        "e": "a=b",
    }
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        overrides(["=1"])
