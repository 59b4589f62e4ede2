"""A tuning stage that is killed goes on where it stood, on another host, and ends with the bytes of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkouts import ROOT

from retune.config import Prompt, override
from retune.prompt_tuning.checkpoints import Checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
NAME = "ticket_priority"
PROGRAM = """
import json, sys
from dataclasses import replace
from pathlib import Path
from retune.config import load_prompt, override
from retune.records import Lineage
from retune.settings import Settings
from retune.workspace import Workspaces
cache, given, told = sys.argv[1:]
settings = replace(Settings.load(), cache=Path(cache))
prompt = override(load_prompt(settings.prompts / "ticket_priority.yaml"), {"tune.epochs": 3, "tune.validate_every": 10})
workspaces = Workspaces(settings, lambda line: print(line, flush=True))
run = workspaces.run("tune", prompt, Lineage.from_json(json.loads(given)))
Path(told).write_text(json.dumps([run.restored, workspaces.section(run.lineage, "tune", prompt.name)["outs"]]))
"""


@pytest.fixture(scope="module")
def preprocessed(project: Path) -> dict[str, Any]:
    """Lineage after stage preprocess of the first example batch."""
    from retune.settings import Settings
    from retune.tasks.ingest import ingest
    from retune.workspace import Workspaces

    landing = project / ".retune/landing" / NAME
    landing.mkdir(parents=True)
    for file in (ROOT / "examples/batches" / NAME / "1").iterdir():
        shutil.copy(file, landing)
    assert ingest(NAME, "ingest", "test") is not None
    from retune.ledger import Ledger

    workspaces = Workspaces(Settings.load())
    head = Ledger(workspaces.store, "dataset").head()
    assert head is not None
    return workspaces.run("preprocess", prompt_of(project), workspaces.lineage(head.body["data"], head.n)).lineage.to_json()


def prompt_of(project: Path) -> Prompt:
    from retune.config import load_prompt

    return override(load_prompt(project / f"prompts/{NAME}.yaml"), {"tune.epochs": 3, "tune.validate_every": 10})


def start(host: Path, lineage: dict[str, Any], told: Path, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, str(host), json.dumps(lineage), str(told)]
    environ = {**os.environ, "RETUNE_CHECKPOINT_SECONDS": "0", "RETUNE_THREADS": "1", **environment}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_another_host_goes_on_with_a_stage_that_was_killed(
    project: Path, preprocessed: dict[str, Any], tmp_path: Path, how: signal.Signals
) -> None:
    """The worker dies in stage tune; a second one with a cache of its own takes up the last stored step."""
    shutil.rmtree(project / ".retune/store/sections" / NAME / "tune", ignore_errors=True)
    shutil.rmtree(project / ".retune/store/checkpoints", ignore_errors=True)
    first = start(tmp_path / "one", preprocessed, tmp_path / "first")
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("checkpoint of step 9 "):
            break
    else:
        pytest.fail("the stage saved no checkpoint")
    asked = time.monotonic()
    os.kill(first.pid, how)
    output = first.stdout.read()
    assert first.wait(timeout=30) != 0
    if how == signal.SIGTERM:
        assert time.monotonic() - asked < 5, output  # what Airflow gives
        assert "stopped by signal SIGTERM" in output
    (stored,) = (project / ".retune/store/checkpoints" / NAME).iterdir()
    (tmp_path / "seen").write_bytes(stored.read_bytes())
    state = Checkpoint(tmp_path / "seen").load()
    assert state is not None
    assert state.step >= 9

    second = start(tmp_path / "two", preprocessed, tmp_path / "second")
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert f"going on from the checkpoint of step {state.step} of" in output
    assert stored.read_bytes() == b""  # used up
    restored, outs = json.loads((tmp_path / "second").read_text())
    assert not restored

    shutil.rmtree(project / ".retune/store/sections" / NAME / "tune")
    whole = start(tmp_path / "three", preprocessed, tmp_path / "whole", RETUNE_CHECKPOINT_SECONDS="3600")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    assert "going on from the checkpoint" not in output
    assert json.loads((tmp_path / "whole").read_text()) == [False, outs]
