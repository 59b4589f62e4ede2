import os
from pathlib import Path
from typing import Any

import pytest

from retune.config import Prompt

ROOT = Path(__file__).parents[3]


def make_prompt(**fields: Any) -> Prompt:
    raw: dict[str, Any] = {
        "name": "tickets",
        "task": "classification",
        "base_model": {"path": "x", "sha256": "0" * 64},
        "source": {"path": "landing"},
        "template": "T: {text}\nP:",
        "target": "label",
        "labels": {"low": " low", "high": " high"},
    }
    return Prompt.model_validate(raw | fields)


@pytest.fixture
def prompt() -> Prompt:
    return make_prompt()


@pytest.fixture
def shared_data() -> Path:
    """Real text that is never copied into the project: beside the checkout, or where RETUNE_SHARED_DATA says."""
    folder = Path(os.environ.get("RETUNE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real text is absent: no folder {folder} (set RETUNE_SHARED_DATA)")
    return folder


@pytest.fixture
def make() -> Any:
    return make_prompt
