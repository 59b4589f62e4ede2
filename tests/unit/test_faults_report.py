"""The faults' file and page: a row takes the place of its scenario's earlier one, and what was not run is never shown as passed."""

import json
from pathlib import Path

import pytest
from faults import everything, report  # noqa: F401  everything: enters the scenarios
from faults.scenario import SCENARIOS, Bench, NotPossible, Outcome, Row


def row(name: str, **found: object) -> Row:
    one = SCENARIOS[name]
    kept: Row = {
        "name": name,
        "fault": one.fault,
        "stage": one.stage,
        "did": one.did,
        "happened": "it | went on",
        "recovered": True,
        "seconds": 1.0,
        "lost": 0,
        "doubled": 0,
    }
    return {**kept, **found}  # type: ignore[typeddict-item]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    page = tmp_path / "reliability.md"
    page.write_text(report.PAGE.read_text("utf-8"), "utf-8")
    return {"to": tmp_path / "faults.json", "page": page}


def test_the_page_shows_the_results(files: dict[str, Path]) -> None:
    known = report.read()
    lines = report.PAGE.read_text("utf-8").splitlines()
    assert [line for line in report.table(known).splitlines() if line not in lines] == []
    assert {(one["fault"], one["stage"]) for one in known["rows"]} <= {(one.fault, one.stage) for one in SCENARIOS.values()}


def test_a_row_replaces_the_one_of_its_scenario_alone(files: dict[str, Path]) -> None:
    empty: report.Results = {"machine": "", "rows": [], "not_run": []}
    found = report.write(empty, row("kill-tune", lost=3), **files)
    found = report.write(found, row("race-s3"), **files)
    found = report.write(found, row("kill-tune"), **files)
    assert [(one["name"], one["lost"]) for one in found["rows"]] == [("kill-tune", 0), ("race-s3", 0)]
    assert json.loads(files["to"].read_text("utf-8")) == found
    text = files["page"].read_text("utf-8")
    assert text.count("| it \\| went on | yes | 1.0 | 0 | 0 |") == 2
    assert list(files["to"].parent.glob("*.partial")) == []


def test_what_was_not_run_is_listed_with_the_reason_and_never_as_passed(files: dict[str, Path]) -> None:
    empty: report.Results = {"machine": "", "rows": [], "not_run": []}
    found = report.write(empty, skipped=report.skipped(["disk-full-tune"], "only root may")[0], **files)
    passed, missing = files["page"].read_text("utf-8").split("\nNot run:\n")
    assert "full disk" not in passed
    assert missing.count("only root may") == 1
    assert missing.count("never run") == len(SCENARIOS) - 1
    assert "Postgres restart" in missing
    found = report.write(found, row("disk-full-tune"), **files)
    assert found["not_run"] == []


def test_what_scenarios_share_is_started_once_and_stopped_at_the_end(tmp_path: Path) -> None:
    from collections.abc import Iterator
    from contextlib import contextmanager

    log: list[str] = []

    @contextmanager
    def server(_bench: Bench, folder: Path) -> Iterator[Path]:
        log.append("started")
        yield folder
        log.append("stopped")

    with Bench(tmp_path) as bench:
        folders = {bench.shared(server), bench.shared(server)}
        with bench.at("one"):
            assert bench.folder == tmp_path / "one"
        assert not (tmp_path / "one").exists()
    assert len(folders) == 1
    assert log == ["started", "stopped"]


def test_a_scenario_that_cannot_run_here_says_so(tmp_path: Path) -> None:
    from faults.scenario import Scenario

    def impossible(_bench: Bench) -> Outcome:
        raise NotPossible("no disk")

    with pytest.raises(NotPossible, match="no disk"):
        Scenario("x", "full disk", "all", "", False, impossible).run(Bench(tmp_path))
