from pathlib import Path

import pytest

from retune.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A project of its own with nothing in it."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "prompts").mkdir()
    return Settings.load({"RETUNE_PROJECT": str(tmp_path)})
