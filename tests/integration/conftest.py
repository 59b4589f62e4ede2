"""Fixtures of the tests that start real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkouts import Demonstrated, copy_project, environment_of, run
from small import small_project


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
        return Demonstrated(folder, run(folder, "retune.local.demo").stdout)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `small.small_project`; the tests that use it leave it whole, though with other rows."""
    return small_project(tmp_path_factory.mktemp("small"))
