"""Makes the scripts of examples/ importable, as they import each other, and reads the committed batches without Retune's own reader."""

import csv
import io
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))

WRITTEN_AS = {
    "1/2026-01-helpdesk.csv": ("utf-8", ","),
    "1/2026-02-helpdesk.csv": ("utf-8-sig", ","),
    "2/2026-03-helpdesk-export.csv": ("cp1252", ";"),
    "2/2026-03-chat-and-app.jsonl": ("utf-8", None),
    "3/2026-04-crm.tsv": ("utf-8", "\t"),
    "3/2026-04-app.parquet": (None, None),
}
"""Encoding and delimiter of each file of ticket_priority, in the order in which they land."""
SUMMARIES_WRITTEN_AS = {"1/2026-01-summaries.csv": ("utf-8", ","), "2/2026-03-summaries.jsonl": ("utf-8", None)}
"""Those of ticket_summary."""


@pytest.fixture(scope="session")
def examples() -> Path:
    return EXAMPLES


@pytest.fixture(scope="session")
def landed() -> dict[str, list[dict[str, str | None]]]:
    """The rows of each committed file of ticket_priority."""
    return {name: _read(EXAMPLES / "batches/ticket_priority" / name, *how) for name, how in WRITTEN_AS.items()}


@pytest.fixture(scope="session")
def summarised() -> dict[str, list[dict[str, str | None]]]:
    """The rows of each committed file of ticket_summary."""
    return {name: _read(EXAMPLES / "batches/ticket_summary" / name, *how) for name, how in SUMMARIES_WRITTEN_AS.items()}


def _read(path: Path, encoding: str | None, delimiter: str | None) -> list[dict[str, str | None]]:
    if encoding is None:
        return pq.read_table(path).to_pylist()
    text = path.read_bytes().decode(encoding)
    if delimiter is None:
        return [json.loads(line) for line in text.split("\n") if line]
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
