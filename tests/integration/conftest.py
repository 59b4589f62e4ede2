"""Fixtures of the tests that start real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkouts import PLANTED, Demonstrated, copy_project, environment_of, run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout of its own."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    with environment_of(folder):
        yield folder


@pytest.fixture(scope="session")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> Demonstrated:
    folder = copy_project(tmp_path_factory.mktemp("demo"))
    with environment_of(folder):
        return Demonstrated(folder, run(folder, "retune.local.demo", **PLANTED).stdout)
