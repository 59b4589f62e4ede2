"""Real processes that tune: killed at random steps, and two that share one run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from retune.inference.release import write_release
from retune.prompt_tuning import tune
from retune.prompt_tuning.checkpoints import Checkpoint

pytestmark = pytest.mark.integration
SETTINGS = {"method": "prompt_tuning", "num_virtual_tokens": 4, "epochs": 10, "batch_size": 4, "validate_every": 7}


def test_twenty_kills_at_random_steps_leave_no_trace(tmp_path: Path) -> None:
    """`kill -9` of a process that tunes, at a step drawn anew each time; the next process ends with the same release, byte for byte."""
    base, prompt = tiny.make_base("llama"), tiny.make_prompt(tune=SETTINGS)
    train, validation = tiny.make_rows(48, 0), tiny.make_rows(16, 1)

    def release(folder: Path, file: Path | None) -> None:
        checkpoint = None if file is None else Checkpoint(file, 0)
        write_release(folder, prompt, tune(base, prompt, train, validation, checkpoint=checkpoint).best, base, {})

    def contents(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    release(tmp_path / "whole", None)
    rng = random.Random(5)
    kills = []
    for number in range(20):
        file, folder = tmp_path / f"{number}.checkpoint", tmp_path / str(number)
        seconds = rng.uniform(0.01, 0.6)
        for kill in (True, False):
            child = os.fork()
            if child == 0:
                try:
                    release(folder, file)
                    os._exit(0)
                finally:
                    os._exit(1)
            if kill:
                deadline = time.monotonic() + 60
                while not file.is_file() and time.monotonic() < deadline:
                    time.sleep(0.005)
                time.sleep(seconds)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if kill:
                state = Checkpoint(file).load()
                assert state is not None
                kills.append(state.step)
        assert status == 0
        assert contents(folder) == contents(tmp_path / "whole")
    assert len(set(kills)) > 5, kills  # they were killed at steps of all kinds


def test_two_processes_follow_the_curve_of_one(tmp_path: Path) -> None:
    """Two processes (gloo) with one global batch: the same losses at each step, up to the order of additions."""
    base, prompt = tiny.make_base("llama"), tiny.make_prompt(tune={**SETTINGS, "epochs": 2})
    train, validation = tiny.make_rows(48, 0), tiny.make_rows(16, 1)
    alone = tune(base, prompt, train, validation)
    program = tmp_path / "two.py"
    program.write_text(
        f"import sys, json, torch\nsys.path.insert(0, {str(Path(tiny.__file__).parent)!r})\nimport tiny\n"
        "from retune.prompt_tuning import tune\nfrom retune.prompt_tuning.processes import is_first, process_group\n"
        "import torch.distributed as dist\ntorch.set_num_threads(1)\n"
        f"base, prompt = tiny.make_base('llama'), tiny.make_prompt(tune={ {**SETTINGS, 'epochs': 2}!r})\n"
        "with process_group():\n"
        "    assert dist.get_world_size() == 2\n"
        "    result = tune(base, prompt, tiny.make_rows(48, 0), tiny.make_rows(16, 1))\n"
        "    if is_first():\n"
        f"        json.dump(result.curve, open({str(tmp_path / 'curve.json')!r}, 'w'))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert [row["step"] for row in curve] == [row["step"] for row in alone.curve]
    for name in ("train_loss", "validation_loss"):
        found, expected = ([row[name] or 0.0 for row in rows] for rows in (curve, alone.curve))
        assert found == pytest.approx(expected, rel=1e-4)
