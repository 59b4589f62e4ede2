"""What the images install, as one environment of this machine: the one that runs the tests, and on top of it the packages of
requirements-production.lock, in a folder of their own.

Made at the first use and kept, `production-venv` in RETUNE_TEST_CACHE (else `.retune` of the checkout). Where it cannot be made, tests are
skipped with the reason; with RETUNE_ALL_TIERS=1 they fail.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

import pytest
from checkouts import ROOT

__all__ = ["production_environment"]

LOCK = ROOT / "requirements-production.lock"


def production_environment() -> Path:
    """The folder of its programs."""
    cache = Path(os.environ.get("RETUNE_TEST_CACHE") or ROOT / ".retune").absolute()
    folder, below = cache / "production-venv", Path(sysconfig.get_path("purelib"))
    wanted = f"{sha256(LOCK.read_bytes()).hexdigest()} {below}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "production-venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = folder / "complete"
        if not complete.is_file() or complete.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, below)
            complete.write_text(wanted)
    return folder / "bin"


def _make(folder: Path, below: Path) -> None:
    python, uv = folder / "bin/python", Path(sys.executable).parent / "uv"
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    install = ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "--compile-bytecode", "--python", str(python), "-r", str(LOCK)]
    _run(str(uv), *install)
    own = Path(next(folder.glob("lib/python3*/site-packages")))
    (own / "tests-environment.pth").write_text(f"{below}\n")
    # Its programs name their interpreter in the first line, and must start this one.
    for program in Path(sys.executable).parent.iterdir():
        place = folder / "bin" / program.name
        if program.is_file() and not program.is_symlink() and not place.exists():
            with program.open("rb") as file:
                if file.read(2) != b"#!":
                    continue
            text = program.read_text("utf-8", "surrogateescape")
            text = re.sub(r"\A#!.*python\S*(?=\n)", f"#!{python}", text)
            place.write_text(re.sub(r"(?m)\A#!/bin/sh\n'''exec' \S+", f"#!/bin/sh\n'''exec' {python}", text), "utf-8", "surrogateescape")
            place.chmod(0o755)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = f"{' '.join(command)} ended with {done.returncode}: {' | '.join((done.stderr or done.stdout).strip().splitlines()[-3:])}"
        if os.environ.get("RETUNE_ALL_TIERS") == "1":
            pytest.fail(f"RETUNE_ALL_TIERS=1, but there is no production environment: {said}")
        pytest.skip(f"no production environment: {said}")
