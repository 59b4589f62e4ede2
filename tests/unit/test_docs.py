"""What README and docs name exists: paths, links, make targets, commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = {path.name for path in ROOT.iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    """Backticked words that begin with a file or folder of the top level; what only exists at run time is under .retune, .venv, data."""
    words = re.findall(r"`([\w./-]+)`", page.read_text("utf-8"))
    named = [w for w in words if "/" in w and w.split("/")[0] in TOP - {".retune", ".venv", "data", "artifacts"}]
    assert [w for w in named if not (ROOT / w).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE)}
    assert named - targets == set()


def test_commands_exist() -> None:
    shown = subprocess.run([sys.executable, "-m", "retune.cli", "--help"], capture_output=True, text=True, check=True).stdout
    named = {c for page in PAGES for c in re.findall(r"(?:^|`)retune ([a-z]+)", page.read_text("utf-8"), re.MULTILINE)}
    assert named
    assert [c for c in named if not re.search(rf"^\W*{c}\b", shown, re.MULTILINE)] == []


def test_every_setting_is_in_the_example_file() -> None:
    code = [f for d in ("src", "dags", "plugins") for f in (ROOT / d).rglob("*.py")]
    used = {name for f in code for name in re.findall(r"\bRETUNE_[A-Z_]*[A-Z]\b", f.read_text("utf-8"))}
    named = set(re.findall(r"^# ([A-Z_0-9]+)=", (ROOT / ".env.example").read_text("utf-8"), re.MULTILINE))
    handed_down = {"RETUNE_STACK", "RETUNE_CHECKPOINT"}  # by `retune up` to its processes, by a workspace to stage tune
    assert used - named == handed_down
