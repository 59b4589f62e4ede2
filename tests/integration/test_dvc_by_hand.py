"""DVC by hand on a git clone, as the README says, and releases made again from what the ledger recorded. Real DVC, real git."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from retune.cli import app
from retune.config import load_prompt, override
from retune.dvc_files import object_name, sections
from retune.errors import BadInputError, IntegrityError
from retune.ledger import Ledger
from retune.recorded import Recorded, champion, find
from retune.reproduce import reproduce
from retune.settings import Settings
from retune.tasks.context import Context
from retune.tasks.ingest import ingest
from retune.tasks.patch import log_patch
from retune.tasks.release import read_release_record
from retune.workspace import Workspaces

pytestmark = pytest.mark.integration
PROMPT = "ticket_priority"
LAST = f"evaluate@{PROMPT}"
"""With what it follows from, it is all of one prompt; another prompt of the checkout may have no release yet."""
IDENTITY = ["-c", "user.name=Retune tests", "-c", "user.email=tests@localhost"]


@dataclass(frozen=True)
class Loop:
    """A project whose store holds one dataset revision, the template alone, and one promoted release."""

    project: Path
    template: str
    """Release id of entry 0."""
    champion: str


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *IDENTITY, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def dvc(folder: Path, *arguments: str) -> str:
    """Output of a DVC command that must end with 0 and warn of nothing."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("WARNING|ERROR", done.stderr), done.stderr
    return done.stdout


def retune(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.stdout if "--json" in arguments else result.output


@pytest.fixture(scope="module")
def loop(project: Path) -> Loop:
    """What the tasks of a retrain run leave in store and ledger, with one epoch and without MLflow."""
    place = project / f"prompts/{PROMPT}.yaml"
    place.write_text(place.read_text("utf-8").replace("epochs: 8", "epochs: 1  # quick"), "utf-8")
    git(project, "commit", "-qam", "quick")
    zone = project / f".retune/landing/{PROMPT}"
    shutil.copytree(project / f"examples/batches/{PROMPT}/1", zone)
    ingest(PROMPT, "ingest", "tester")
    settings = Settings.load()
    workspaces = Workspaces(settings)
    head = Ledger(workspaces.store, "dataset").head()
    assert head is not None
    prompt = load_prompt(place)
    bare = override(prompt, {"tune.method": "none"})
    start = workspaces.run("preprocess", prompt, workspaces.lineage(head.body["data"], head.n)).lineage
    template = workspaces.run("tune", bare, start).lineage
    tuned = workspaces.run("evaluate", prompt, workspaces.run("tune", prompt, start).lineage).lineage
    first, second = (read_release_record(workspaces, prompt, lineage) for lineage in (template, tuned))
    ledger = Ledger(workspaces.store, PROMPT)
    entry = ledger.append("found", "tester", "alone", {"champion": first.champion("1", {}), "lineage": template.to_json()}, None)
    body = {"champion": second.champion("2", {}), "candidate": {"release": second.release, "metrics": {}}, "lineage": tuned.to_json()}
    ledger.append("promote", "tester", "better", body, entry)
    return Loop(project, first.release, second.release)


@pytest.fixture
def clone(loop: Loop, tmp_path: Path) -> Iterator[Path]:
    """A clean clone, with the store named by the environment."""
    folder = tmp_path / "clone"
    git(loop.project, "clone", "-q", str(loop.project), str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETUNE_PROJECT", str(folder))
        patch.setenv("RETUNE_STORE", str(loop.project / ".retune/store"))
        patch.setenv("PYTHONPATH", str(folder / "src"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{Path('/usr/bin')}:/bin")
        yield folder


def test_a_clone_is_up_to_date_after_checkout_and_pull(loop: Loop, clone: Path) -> None:
    told = retune("checkout")
    assert f"release {loop.champion[:12]}" in told
    assert "other code" not in told
    assert "added" in dvc(clone, "pull", "-d", LAST)
    assert "up to date" in dvc(clone, "status", "-d", LAST)
    repeated = dvc(clone, "repro", LAST)
    assert "Running stage" not in repeated
    assert "up to date" in repeated
    metrics = json.loads(dvc(clone, "metrics", "diff", "--json"))
    assert 0 < metrics[f"artifacts/{PROMPT}/metrics.json"]["metrics.accuracy"]["new"] <= 1
    subprocess.run([sys.executable, "-m", "dvc", "plots", "diff"], cwd=clone, check=True)
    assert f"artifacts/{PROMPT}/release" in dvc(clone, "diff")
    assert sorted(git(clone, "status", "--porcelain").split()) == ["M", "M", "data.dvc", "dvc.lock"]
    git(clone, "commit", "-qam", "as released")

    # What retunes nothing by Airflow's hand retunes nothing by this one.
    place = clone / f"prompts/{PROMPT}.yaml"
    place.write_text(place.read_text("utf-8").replace("min_gain: 0.02", "min_gain: 0.03"), "utf-8")
    again = dvc(clone, "repro", LAST)
    assert re.findall(r"Running stage '(\w+)@", again) == ["resolve"]
    assert json.loads(dvc(clone, "metrics", "diff", "--json")) == {}
    dvc(clone, "plots", "diff")


def test_checkout_keeps_what_is_not_committed(loop: Loop, clone: Path) -> None:
    stranger = {"cmd": "true", "outs": [{"path": "artifacts/other/x", "hash": "md5", "md5": "0" * 32, "size": 1}]}
    lock = yaml.safe_load((clone / "dvc.lock").read_text("utf-8"))
    lock["stages"]["tune@other"] = stranger
    (clone / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False), "utf-8")
    refused = retune("checkout", code=1)
    assert "dvc.lock hold changes that are not committed" in refused
    assert "--force" in refused
    shown = retune("checkout", loop.template[:10], "--show-command")
    assert "git apply" in shown
    assert "dvc remote modify --local store url" in shown
    assert "tune@other" in (clone / "dvc.lock").read_text("utf-8")
    laid = json.loads(retune("checkout", loop.template[:10], "--force", "--json"))
    assert laid["prompts"][0]["release"] == loop.template
    assert laid["prompts"][0]["changed_code"] == []
    found = sections((clone / "dvc.lock").read_text("utf-8"))
    assert found["tune@other"] == stranger
    assert {name for name in found if name.endswith(PROMPT)} == {f"{stage}@{PROMPT}" for stage in ("resolve", "preprocess", "tune")}
    assert load_prompt(clone / f"prompts/{PROMPT}.yaml").tune.method == "none"


def test_a_dataset_revision_comes_with_what_is_known_of_it(loop: Loop, clone: Path) -> None:
    laid = json.loads(retune("checkout", "--data", "0", "--json"))
    assert (laid["revision"], laid["prompts"][0]["release"]) == (0, None)
    assert f"evaluate@{PROMPT}" in sections((clone / "dvc.lock").read_text("utf-8"))
    assert "from 0 to 0, got 7" in retune("checkout", "--data", "7", code=1)


def test_other_code_is_told_with_the_commit(loop: Loop, clone: Path) -> None:
    commit = git(clone, "rev-parse", "HEAD").strip()
    (clone / "src/retune/text.py").write_text("# other\n" + (clone / "src/retune/text.py").read_text("utf-8"), "utf-8")
    told = retune("checkout", loop.champion)
    assert "src/retune/text.py" in told
    assert f"git checkout {commit}" in told


def test_the_patch_of_a_run_applies_and_pulls(loop: Loop, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.load()
    context = Context.load(load_prompt(settings.prompts / f"{PROMPT}.yaml"))
    recorded = champion(context.workspaces.store, PROMPT)
    assert recorded is not None
    run_id = context.tracker.open("patch", "patch", {})
    log_patch(context, run_id, recorded.lineage)
    patch = context.tracker.client.download_artifacts(run_id, "patch/retune.patch", str(clone.parent))
    git(clone, "apply", patch)
    assert sorted(git(clone, "status", "--porcelain").split()) == ["M", "M", "data.dvc", "dvc.lock"]
    dvc(clone, "remote", "modify", "--local", "store", "url", f"{settings.store}/dvc")
    dvc(clone, "pull", "-d", LAST)
    assert "up to date" in dvc(clone, "status", "-d", LAST)
    assert (clone / f"artifacts/{PROMPT}/release/manifest.json").is_file()


def test_a_release_is_made_again_byte_for_byte(loop: Loop, clone: Path) -> None:
    (clone / "src/retune/text.py").write_text("# the recorded commit's code runs, not this\n", "utf-8")
    told = retune("reproduce", PROMPT, "--keep", str(clone.parent / "rebuilt"))
    assert re.findall(r"Running stage '(\w+)@", told) == ["preprocess", "tune"]
    assert f"11 files, release {loop.champion[:12]}, byte for byte" in told
    assert (clone.parent / "rebuilt/manifest.json").is_file()
    assert not (clone / ".retune").exists()


def test_the_template_alone_is_made_again(loop: Loop, clone: Path) -> None:
    told = json.loads(retune("reproduce", PROMPT, "--release", loop.template[:12], "--json"))
    assert (told["release"], told["rebuilt"], told["equal"]) == (loop.template, loop.template, True)


def test_an_unlike_machine_gets_a_tolerance_report(loop: Loop, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is held to the instructions of an old processor: other kernels, other rounding."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    told = retune("reproduce", PROMPT, code=3)
    assert "differs  artifacts/ticket_priority/release/adapter/adapter_model.safetensors" in told
    assert "kernels here default, recorded best" in told
    assert "within the tolerance" in told


def tampered(recorded: Recorded, change: Any) -> Recorded:
    lock = yaml.safe_load(recorded.lineage.lock)
    change(lock["stages"][f"tune@{PROMPT}"])
    return replace(recorded, lineage=replace(recorded.lineage, lock=yaml.safe_dump(lock, sort_keys=False)))


def _other_code(section: dict[str, Any]) -> None:
    next(dep for dep in section["deps"] if dep["path"] == "src/retune/text.py")["md5"] = "0" * 32


def _other_parameter(section: dict[str, Any]) -> None:
    section["params"][f"artifacts/{PROMPT}/prompt.yaml"]["tune"]["seed"] = 14


def _other_dataset(section: dict[str, Any]) -> None:
    next(dep for dep in section["deps"] if dep["path"].endswith("train.parquet"))["md5"] = "0" * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [(_other_code, "src/retune/text.py"), (_other_parameter, "parameter tune"), (_other_dataset, "train.parquet")],
    ids=["code", "parameter", "dataset"],
)
def test_a_tampered_lineage_is_caught_before_anything_runs(loop: Loop, clone: Path, change: Any, message: str) -> None:
    settings = Settings.load()
    recorded = champion(Workspaces(settings).store, PROMPT)
    assert recorded is not None
    log: list[str] = []
    with pytest.raises(IntegrityError, match=f"the lineage was changed.*{message}"):
        reproduce(settings, tampered(recorded, change), log=log.append)
    assert not any("dvc repro" in line for line in log)


def test_another_release_under_the_recorded_id_is_caught(loop: Loop, clone: Path) -> None:
    settings = Settings.load()
    store = Workspaces(settings).store
    recorded, other = champion(store, PROMPT), find(store, [PROMPT], loop.template)
    assert recorded is not None
    with pytest.raises(IntegrityError, match="must be"):
        reproduce(settings, replace(recorded, lineage=other.lineage), log=lambda _: None)


def test_data_that_read_back_otherwise_are_caught(loop: Loop, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    shutil.copytree(loop.project / ".retune/store", store)
    monkeypatch.setenv("RETUNE_STORE", str(store))
    workspaces = Workspaces(Settings.load())
    recorded = champion(workspaces.store, PROMPT)
    assert recorded is not None
    md5 = next(iter(workspaces.files(recorded.lineage, f"data/{PROMPT}").values()))
    place = store / "dvc" / object_name(md5)
    place.chmod(0o600)
    place.write_bytes(place.read_bytes() + b"x")
    assert "changed or cut after it was pushed" in retune("reproduce", PROMPT, code=1)


def test_code_that_nobody_recorded_is_asked_for(loop: Loop, clone: Path) -> None:
    settings = Settings.load()
    recorded = champion(Workspaces(settings).store, PROMPT)
    assert recorded is not None
    (clone / "src/retune/text.py").write_text("# other\n", "utf-8")
    lineage = replace(recorded.lineage, commit="unknown", dirty=True)
    with pytest.raises(BadInputError, match=r"src/retune/text\.py; check out"):
        reproduce(settings, replace(recorded, lineage=lineage), log=lambda _: None)
