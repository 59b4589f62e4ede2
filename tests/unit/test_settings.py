"""Settings that are refused, by name."""

from pathlib import Path

import pytest

from retune.errors import ConfigError
from retune.settings import Settings


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    return tmp_path


def price(project: Path, value: str) -> float | None:
    return Settings.load({"RETUNE_PROJECT": str(project), "RETUNE_DEVICE_HOUR_PRICE": value}).device_hour_price


def test_an_hour_has_a_price_only_where_one_is_set(project: Path) -> None:
    assert Settings.load({"RETUNE_PROJECT": str(project)}).device_hour_price is None
    assert (price(project, ""), price(project, "0"), price(project, "2.5")) == (None, 0.0, 2.5)


@pytest.mark.parametrize("value", ["free", "-1", "nan", "inf"])
def test_a_price_that_is_none_is_refused(project: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=f"RETUNE_DEVICE_HOUR_PRICE must be a number of 0 or more, .* got '{value}'"):
        price(project, value)
