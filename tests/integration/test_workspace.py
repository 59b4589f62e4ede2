"""Workspaces on a real DVC, a folder store, and a cache of its own per host."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from retune.config import Prompt
from retune.dvc_files import EMPTY_DATA
from retune.errors import BadInputError, IntegrityError, StageError
from retune.records import Lineage
from retune.settings import Settings
from retune.stages import BAD_INPUT
from retune.workspace import Workspaces

pytestmark = pytest.mark.integration

STAGE = f"""
import json, pathlib, sys, time, yaml
fields = yaml.safe_load(open("artifacts/p/prompt.yaml"))
what = sys.argv[1]
if what == "preprocess":
    seed = fields["preprocess"]["augmentation"]["seed"]
    if seed == 13:
        print({BAD_INPUT!r} + json.dumps(["BadInputError", "label must be low"]))
        sys.exit(3)
    if seed == 14:
        print("the disk is full")
        sys.exit(1)
    if seed == 15:
        time.sleep(300)
    out = pathlib.Path("artifacts/p/dataset")
    out.mkdir(parents=True)
    text = "".join(p.read_text() for p in sorted(pathlib.Path("data/p").iterdir()))
    (out / "train.txt").write_text(text)
    (out / "test.txt").write_text(text.upper())
else:
    pathlib.Path("artifacts/p").mkdir(parents=True, exist_ok=True)
    pathlib.Path("artifacts/p/release").write_text(what + " " + pathlib.Path("artifacts/p/dataset/train.txt").read_text())
"""
DVC_YAML: dict[str, Any] = {
    "stages": {
        "resolve": {
            "foreach": "${prompts}",
            "do": {
                "cmd": "python src/resolve.py ${item}",
                "deps": ["prompts/${item}.yaml", "src/stage.py"],
                "outs": ["artifacts/${item}/prompt.yaml"],
            },
        },
        "preprocess": {
            "foreach": "${prompts}",
            "do": {
                "cmd": "python src/stage.py preprocess ${item}",
                "deps": ["data/${item}", "src/stage.py"],
                "params": [{"artifacts/${item}/prompt.yaml": ["preprocess"]}],
                "outs": ["artifacts/${item}/dataset"],
            },
        },
        "tune": {
            "foreach": "${prompts}",
            "do": {
                "cmd": "python src/stage.py tune ${item}",
                "deps": ["artifacts/${item}/dataset/train.txt", "src/stage.py"],
                "params": [{"artifacts/${item}/prompt.yaml": ["tune"]}],
                "outs": ["artifacts/${item}/release"],
            },
        },
        "evaluate": {
            "foreach": "${prompts}",
            "do": {
                "cmd": "python src/stage.py evaluate ${item}",
                "deps": ["artifacts/${item}/release", "src/stage.py"],
                "params": [{"artifacts/${item}/prompt.yaml": ["task"]}],
                "metrics": ["artifacts/${item}/metrics.json"],
            },
        },
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two quick stages."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "src").mkdir()
    (folder / "src/stage.py").write_text(STAGE)
    (folder / "dvc.yaml").write_text(yaml.safe_dump(DVC_YAML))
    (folder / "requirements.lock").write_text("")
    (folder / ".dvcignore").write_text("__pycache__\n")
    return folder


def host(folder: Path, name: str) -> tuple[Workspaces, list[str]]:
    """A host with a cache of its own on the shared store, and what it logs."""
    log: list[str] = []
    settings = Settings.load({"RETUNE_PROJECT": str(folder), "RETUNE_CACHE": str(folder / f"cache-{name}")})
    return Workspaces(settings, log.append), log


def host_with_damage(folder: Path, tmp_path: Path, content: bytes, found: bytes) -> tuple[Workspaces, str]:
    """A host on a copy of the project whose store has other bytes in place of a content, and that content's hash."""
    copy = tmp_path / "project"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("cache-*"))
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    place = copy / ".retune/store/dvc/files/md5" / md5[:2] / md5[2:]
    place.chmod(0o644)
    place.write_bytes(found)
    return host(copy, "reader")[0], md5


def prompt(seed: int = 0, description: str = "") -> Prompt:
    return Prompt.model_validate(
        {
            "name": "p",
            "description": description,
            "task": "generation",
            "base_model": {"hub": "org/name", "revision": "0" * 40},
            "template": "{text}",
            "target": "answer",
            "preprocess": {"augmentation": {"seed": seed}},
        }
    )


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    """A data.dvc with one file of prompt p and one of another prompt."""
    (folder / "a").write_text("one\n")
    (folder / "z").write_text("foreign\n")
    return host(folder, "ingest")[0].add_data(EMPTY_DATA, {"p/a": folder / "a", "other/z": folder / "z"})


@pytest.fixture(scope="module")
def done(folder: Path, data: str) -> Lineage:
    """Both stages, run once."""
    workspaces, _ = host(folder, "first")
    run = workspaces.run("preprocess", prompt(), workspaces.lineage(data, 0))
    assert not run.restored
    run = workspaces.run("tune", prompt(), run.lineage)
    assert not run.restored
    return run.lineage


def test_another_host_restores_both_stages_without_dvc(folder: Path, data: str, done: Lineage) -> None:
    workspaces, log = host(folder, "second")
    run = workspaces.run("preprocess", prompt(), workspaces.lineage(data, 0))
    again = workspaces.run("tune", prompt(), run.lineage)
    assert (run.restored, again.restored) == (True, True)
    assert again.lineage.lock == done.lock
    assert not any(line.startswith("$ dvc") for line in log)
    assert workspaces.read(again.lineage, "artifacts/p/release") == b"tune one\n"


def test_the_resolved_prompt_file_is_laid_as_dvc_would_lay_it(folder: Path, data: str, done: Lineage, tmp_path: Path) -> None:
    workspaces, _ = host(folder, "second")
    section = workspaces.section(done, "resolve", "p")
    assert yaml.safe_load(workspaces.read(done, "artifacts/p/prompt.yaml")) == prompt().model_dump(mode="json")
    assert [dep["path"] for dep in section["deps"]] == ["prompts/p.yaml", "src/stage.py"]
    assert workspaces.prompt_file(done, "p") == workspaces.read(done, "artifacts/p/prompt.yaml"), "this project has no prompt file"
    assert workspaces.changed_code(done, "p") == []
    copy = tmp_path / "project"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("cache-*", ".retune"))
    (copy / "src/stage.py").write_text("# other\n")
    assert host(copy, "first")[0].changed_code(done, "p") == ["src/stage.py"]


def test_a_restored_stage_names_the_machine_that_executed_it(folder: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces, _ = host(folder, "first")
    monkeypatch.setenv("RETUNE_THREADS", "3")
    executed = workspaces.run("preprocess", prompt(seed=3), workspaces.lineage(data, 0))
    monkeypatch.setenv("RETUNE_THREADS", "5")
    restored = workspaces.run("preprocess", prompt(seed=3), workspaces.lineage(data, 0))
    assert (executed.restored, restored.restored) == (False, True)
    assert restored.lineage.machines["preprocess"]["threads"] == executed.lineage.machines["preprocess"]["threads"] == 3
    assert 0 < executed.lineage.machines["preprocess"]["seconds"] <= executed.seconds
    assert restored.lineage.machines == executed.lineage.machines, "its seconds too are those of the execution"


def test_what_is_known_is_laid_and_nothing_runs(folder: Path, data: str, done: Lineage) -> None:
    workspaces, log = host(folder, "asker")
    assert workspaces.known(prompt(), workspaces.lineage(data, 0)).lock == done.lock
    unknown = workspaces.known(prompt(seed=77), workspaces.lineage(data, 0))
    assert "resolve@p" in unknown.lock
    assert "preprocess@p" not in unknown.lock
    assert log == []


def test_an_execution_restores_and_records_nothing(folder: Path, data: str, done: Lineage, tmp_path: Path) -> None:
    before = sorted((folder / ".retune/store").rglob("*"))
    workspaces, log = host(folder, "executor")
    made = workspaces.execute(prompt(), done, {"RETUNE_THREADS": "1"})
    assert sum(line.startswith("Running stage") for line in log) == 2
    assert workspaces.files(made, "artifacts/p/dataset") == workspaces.files(done, "artifacts/p/dataset")
    assert sorted((folder / ".retune/store").rglob("*")) == before


def test_a_description_reruns_nothing_a_parameter_does(folder: Path, data: str, done: Lineage) -> None:
    workspaces, _ = host(folder, "first")
    start = workspaces.lineage(data, 0)
    assert workspaces.run("preprocess", prompt(description="new"), start).restored
    changed = workspaces.run("preprocess", prompt(seed=1), start)
    assert not changed.restored
    assert workspaces.run("tune", prompt(seed=1), changed.lineage).restored, "the same train.txt: nothing to tune anew"


def test_only_named_inputs_are_pulled(folder: Path, done: Lineage) -> None:
    workspaces, _ = host(folder, "puller")
    other = prompt().model_copy(update={"tune": prompt().tune.model_copy(update={"seed": 99})})
    assert not workspaces.run("tune", other, done).restored
    cache = {p.read_bytes() for p in (folder / "cache-puller/files/md5").rglob("*") if p.is_file() and p.suffix != ".dir"}
    assert b"one\n" in cache
    assert b"ONE\n" not in cache
    assert b"foreign\n" not in cache


def test_code_that_a_stage_depends_on_reruns_it(folder: Path, data: str, done: Lineage, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("cache-*"))
    (copy / "src/stage.py").write_text(STAGE + "\n# changed\n")
    workspaces, _ = host(copy, "first")
    assert not workspaces.run("preprocess", prompt(), workspaces.lineage(data, 0)).restored


def test_what_is_gone_from_the_store_is_made_again(folder: Path, data: str, done: Lineage, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("cache-*"))
    workspaces, log = host(copy, "first")
    md5 = hashlib.md5(b"ONE\n", usedforsecurity=False).hexdigest()
    (copy / ".retune/store/dvc/files/md5" / md5[:2] / md5[2:]).unlink()
    run = workspaces.run("preprocess", prompt(), workspaces.lineage(data, 0))
    assert not run.restored
    assert any("gone from the store" in line for line in log)
    assert workspaces.read(run.lineage, "artifacts/p/dataset/test.txt") == b"ONE\n"


def test_changed_bytes_in_the_store_are_refused(folder: Path, done: Lineage, tmp_path: Path) -> None:
    workspaces, _ = host_with_damage(folder, tmp_path, b"tune one\n", b"tune two\n")
    with pytest.raises(IntegrityError, match="changed or cut"):
        workspaces.read(done, "artifacts/p/release")


def test_a_damaged_input_in_the_store_is_named(folder: Path, data: str, tmp_path: Path) -> None:
    workspaces, md5 = host_with_damage(folder, tmp_path, b"one\n", b"on")
    with pytest.raises(IntegrityError, match=f"{md5[2:]}.*changed or cut"):
        workspaces.run("preprocess", prompt(seed=6), workspaces.lineage(data, 0))


def test_a_damaged_listing_in_the_hosts_cache_is_not_believed(folder: Path, data: str) -> None:
    workspaces, _ = host(folder, "damaged")
    workspaces.run("preprocess", prompt(seed=21), workspaces.lineage(data, 0))
    listings = list((folder / "cache-damaged").rglob("*.dir"))
    assert listings
    for place in listings:
        place.chmod(0o644)
        place.write_bytes(b"[]")
        place.chmod(0o444)  # DVC trusts whatever is read-only
    # The data's is fetched anew; that of what the stage makes is met once it is made again.
    with pytest.raises(StageError, match=r"held a damaged copy of \w+\.dir, which preprocess@p made again; it is removed: run it again"):
        workspaces.run("preprocess", prompt(seed=22), workspaces.lineage(data, 0))
    run = workspaces.run("preprocess", prompt(seed=22), workspaces.lineage(data, 0))
    assert not run.restored
    assert workspaces.read(run.lineage, "artifacts/p/dataset/test.txt") == b"ONE\n"


def test_data_are_added_and_removed_without_pulling_the_rest(folder: Path, data: str) -> None:
    (folder / "b").write_text("two\n")
    workspaces, _ = host(folder, "adder")
    added = workspaces.add_data(data, {"p/b": folder / "b"})
    lineage = workspaces.lineage(added, 1)
    assert set(workspaces.files(lineage, "data")) == {"p/a", "p/b", "other/z"}
    assert workspaces.data_hash(lineage, "p") != workspaces.data_hash(workspaces.lineage(data, 0), "p")
    assert workspaces.data_hash(lineage, "other") == workspaces.data_hash(workspaces.lineage(data, 0), "other")
    replaced = workspaces.lineage(workspaces.add_data(added, {"p/c": folder / "b"}, ("p/a", "p/b")), 2)
    assert set(workspaces.files(replaced, "data")) == {"p/c", "other/z"}
    cache = {p.read_bytes() for p in (folder / "cache-adder/files/md5").rglob("*") if p.is_file() and p.suffix != ".dir"}
    assert cache == {b"two\n"}


def test_an_earlier_output_stands_beside_todays_data(folder: Path, data: str, done: Lineage) -> None:
    workspaces, _ = host(folder, "first")
    outs = workspaces.section(done, "tune", "p")["outs"]
    (folder / "later").write_text("later\n")
    later = workspaces.lineage(workspaces.add_data(data, {"p/later": folder / "later"}), 3)
    beside = workspaces.with_output(workspaces.run("preprocess", prompt(), later).lineage, prompt(), "tune", outs)
    assert workspaces.read(beside, "artifacts/p/release") == b"tune one\n"
    assert workspaces.read(beside, "artifacts/p/dataset/train.txt") == b"one\nlater\n"


@pytest.mark.parametrize(
    ("seed", "error", "message"), [(13, BadInputError, "label must be low"), (14, StageError, "the disk is full")], ids=["input", "fault"]
)
def test_a_failed_stage_says_why_and_whether_a_retry_can_help(
    folder: Path, data: str, seed: int, error: type[Exception], message: str
) -> None:
    workspaces, _ = host(folder, "first")
    with pytest.raises(error, match=message):
        workspaces.run("preprocess", prompt(seed=seed), workspaces.lineage(data, 0))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_stage_ends_with_its_task(folder: Path, data: str, how: signal.Signals, tmp_path: Path) -> None:
    """The task's process is stopped or killed while its stage runs: nothing of the stage is left, and SIGTERM ends it failed."""
    program = (
        "import json, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "import test_workspace as t\n"
        "w, _ = t.host(Path(sys.argv[2]), 'killed')\n"
        "w.log = lambda line: print(line, flush=True)\n"
        "w.run('preprocess', t.prompt(seed=15), w.lineage(json.loads(sys.argv[3]), 0))\n"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path), "RETUNE_TEST_MARK": str(tmp_path)}
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder), json.dumps(data)]
    task = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert task.stdout is not None
    for line in task.stdout:
        if line.startswith("> python src/stage.py"):
            break
    else:
        pytest.fail("the stage did not start")
    os.kill(task.pid, how)
    output = task.stdout.read()
    code = task.wait(timeout=30)
    assert code == (1 if how == signal.SIGTERM else -9), output
    deadline = time.monotonic() + 15
    while (left := _marked(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    if how == signal.SIGTERM:
        assert "stopped by signal SIGTERM" in output
        assert list(tmp_path.glob("retune-workspace-*")) == []


def _marked(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RETUNE_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found
