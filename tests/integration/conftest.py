"""Fixtures of the tests that start real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkouts import PLANTED, Demonstrated, copy_project, environment_of, run
from compose_stack import Stack, compose_stack, compose_variables, production_project
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
        return Demonstrated(folder, run(folder, "retune.local.demo", **PLANTED).stdout)


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The services of docker-compose.yml with two workers for trials, and the example prompts with landing zones on S3."""
    folder = tmp_path_factory.mktemp("compose")
    project = production_project(folder / "project")
    with compose_stack(project, folder / "stack", compose_variables(folder / ".env")) as stack:
        yield stack


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `small.small_project`; the tests that use it leave it whole, though with other rows."""
    return small_project(tmp_path_factory.mktemp("small"))
