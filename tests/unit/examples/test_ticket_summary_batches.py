"""The committed landing batches are what the script writes, hold what expected.json says, and give some texts several summaries."""

import json
from collections import Counter
from pathlib import Path

import landing
import pytest
import ticket_summary

Rows = list[dict[str, str | None]]


@pytest.fixture(scope="module")
def folder(examples: Path) -> Path:
    return examples / "batches/ticket_summary"


def reason(row: dict[str, str | None]) -> str | None:
    text = row.get("text") or ""
    if not text.strip():
        return "missing_text"
    if len(text) > 20_000:
        return "too_long"
    if len(text.strip()) < 3:
        return "too_short"
    if not row.get("summary"):
        return "missing_label"
    known = row["channel"] in ("email", "chat", "phone", "web", "app") and row["region"] in ("emea", "amer", "apac")
    return None if known else "unknown_slice_value"


def test_the_script_writes_the_committed_files_again(folder: Path, tmp_path: Path) -> None:
    landing.write_batches(ticket_summary.NAME, ticket_summary.plans(), tmp_path)

    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_rows_are_as_expected(folder: Path, summarised: dict[str, Rows]) -> None:
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    earlier: set[tuple[str | None, ...]] = set()
    assert list(expected) == list(summarised)
    for name, rows in summarised.items():
        counts = expected[name]
        usable = [tuple(row.get(field) for field in ("text", "summary", "channel", "region")) for row in rows if reason(row) is None]
        answers = {(row["text"], row["summary"]) for row in rows if reason(row) in (None, "too_short")}
        assert len(rows) == counts["rows"]
        assert Counter(filter(None, map(reason, rows))) == counts["quarantined"]
        assert len(usable) - len(set(usable)) == counts["exact_duplicates_in_file"]
        assert sum(row in earlier for row in usable) == counts["exact_duplicates_of_earlier_files"]
        assert len(answers) - len({text for text, _ in answers}) == counts["other_answers"] > 20
        earlier |= set(usable)


def test_a_further_summary_says_the_same(summarised: dict[str, Rows]) -> None:
    by_text: dict[str | None, set[str]] = {}
    for row in summarised["1/2026-01-summaries.csv"]:
        if reason(row) is None:
            by_text.setdefault(row["text"], set()).add(row["summary"] or "")
    several = [summaries for summaries in by_text.values() if len(summaries) > 1]
    assert several
    for summaries in several:
        assert len({frozenset(summary.split("; ")) for summary in summaries}) == 1
