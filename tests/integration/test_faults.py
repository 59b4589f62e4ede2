"""The fast fault scenarios: each fault is done to real components, and nothing may be lost or doubled. `make faults` runs them all."""

from collections.abc import Iterator

import pytest
from faults import everything  # noqa: F401  enters the scenarios
from faults.scenario import SCENARIOS, Bench, NotPossible

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("faults")) as bench:
        yield bench


@pytest.mark.parametrize("name", [name for name, one in SCENARIOS.items() if one.fast])
def test_nothing_is_lost_and_nothing_is_doubled(bench: Bench, name: str) -> None:
    try:
        row = SCENARIOS[name].run(bench)
    except NotPossible as reason:
        pytest.skip(str(reason))
    assert (row["recovered"], row["lost"], row["doubled"]) == (True, 0, 0), row["happened"]
