"""The stages of dvc.yaml, each a module that runs as a process of its own: `python -m retune.stages.<stage> <prompt>`."""

import gc
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from retune.config import Prompt, load_prompt, sha256_json
from retune.errors import BadInputError, ConfigError, IntegrityError

__all__ = ["BAD_INPUT", "CHECKPOINT", "code_sha256", "run_stage", "whole_folder"]

gc.set_threshold(100_000)  # a stage lives for seconds and starts by importing a million objects: collecting between them is a fifth of it

BAD_INPUT = "retune-bad-input "
"""Starts the line by which a stage tells its parent process that a retry cannot help; JSON of error and message follows."""
CHECKPOINT = "retune-checkpoint "
"""Starts the line by which stage tune tells its parent process that it has saved a checkpoint; the step follows."""


def run_stage(stage: Callable[[Prompt], None], file: str = "artifacts/{}/prompt.yaml") -> None:
    """Runs a stage on the prompt named on the command line, as `file` has it; exit code 3 if a retry cannot help."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {stage.__module__} PROMPT")
    try:
        stage(load_prompt(Path(file.format(sys.argv[1])), sys.argv[1]))
    except (BadInputError, ConfigError, IntegrityError) as error:
        print(BAD_INPUT + json.dumps([type(error).__name__, str(error)]), file=sys.stderr, flush=True)
        sys.exit(3)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its final name only when the block has ended well."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def code_sha256(stage: str, prompt: str) -> str:
    """Hash of the source files that dvc.yaml names for a stage."""
    text = Path("dvc.yaml").read_text("utf-8").replace("${item}", prompt)
    paths = [Path(d) for d in yaml.safe_load(text)["stages"][stage]["do"]["deps"] if d.startswith("src/")]
    files = [f for p in paths for f in ([p] if p.is_file() else sorted(p.rglob("*"))) if f.is_file() and "__pycache__" not in f.parts]
    return sha256_json({f.as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
