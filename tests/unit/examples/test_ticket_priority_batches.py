"""The committed landing batches are what the script writes, and hold what expected.json says."""

import json
import re
from collections import Counter
from pathlib import Path

import landing
import pyarrow.parquet as pq
import pytest
import ticket_priority

LABELS = {"low", "medium", "high"}
CHANNELS = {"email", "chat", "phone", "web", "app"}
REGIONS = {"emea", "amer", "apac"}
MAIL = re.compile(r"\S+@\S+\.\w+")
CARD = re.compile(r"(?<![\d+])(?:\d{4}[ -]?){4}(?!\d)")
PHONE = re.compile(r"\+[\d -]{10,}|\(?202\)?[ -]555-\d{4}")

Rows = list[dict[str, str | None]]


@pytest.fixture(scope="module")
def folder(examples: Path) -> Path:
    return examples / "batches/ticket_priority"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "expected.json").read_text("utf-8"))


def reason(row: dict[str, str | None]) -> str | None:
    text, label = row.get("text") or "", row.get("label") or ""
    if not text.strip():
        return "missing_text"
    if len(text) > 20_000:
        return "too_long"
    if len(text.strip()) < 3:
        return "too_short"
    if not label:
        return "missing_label"
    if label not in LABELS:
        return "unknown_label"
    if row["channel"] not in CHANNELS or row["region"] not in REGIONS:
        return "unknown_slice_value"
    return None


def content(row: dict[str, str | None]) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in ("text", "label", "channel", "region"))


def test_the_script_writes_the_committed_files_again(folder: Path, tmp_path: Path) -> None:
    landing.write_batches(ticket_priority.NAME, ticket_priority.plans(), tmp_path)

    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in names:
        if name.endswith(".parquet"):  # its bytes name the pyarrow release that wrote them
            assert pq.read_table(tmp_path / name).equals(pq.read_table(folder / name)), name
        else:
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_every_landing_object_is_expected(landed: dict[str, Rows], expected: dict[str, dict]) -> None:
    assert list(expected) == list(landed)


def test_rows_and_quarantine_are_as_expected(landed: dict[str, Rows], expected: dict[str, dict]) -> None:
    for name, rows in landed.items():
        assert len(rows) == expected[name]["rows"], name
        assert Counter(filter(None, map(reason, rows))) == expected[name]["quarantined"], name


@pytest.mark.parametrize(("key", "pattern"), [("with_mail", MAIL), ("with_phone", PHONE), ("with_card", CARD)])
def test_personal_data_are_as_expected(key: str, pattern: re.Pattern[str], landed: dict[str, Rows], expected: dict[str, dict]) -> None:
    found = {name: sum(bool(pattern.search(row.get("text") or "")) for row in rows) for name, rows in landed.items()}

    assert found == {name: counts[key] for name, counts in expected.items()}


def test_exact_duplicates_are_as_expected(landed: dict[str, Rows], expected: dict[str, dict]) -> None:
    earlier: set[tuple[str | None, ...]] = set()
    for name, rows in landed.items():
        usable = [content(row) for row in rows if reason(row) is None]
        in_file = sum(count - 1 for count in Counter(usable).values())
        of_earlier = sum(row in earlier for row in usable)
        earlier |= set(usable)
        assert in_file == expected[name]["exact_duplicates_in_file"], name
        assert of_earlier == expected[name]["exact_duplicates_of_earlier_files"], name


def test_quarantined_rows_are_no_duplicates_however_they_are_counted(landed: dict[str, Rows]) -> None:
    for name, rows in landed.items():
        quarantined = [content(row) for row in rows if reason(row)]
        assert len(set(quarantined)) == len(quarantined), name


def test_made_up_card_numbers_pass_the_luhn_check(landed: dict[str, Rows]) -> None:
    cards = [re.sub(r"\D", "", found) for rows in landed.values() for row in rows for found in CARD.findall(row.get("text") or "")]

    assert "4111111111111111" in cards
    for digits in cards:
        doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
        assert sum(d - 9 * (d > 9) for d in doubled) % 10 == 0, digits


def test_batches_hold_what_makes_reading_hard(folder: Path, landed: dict[str, Rows]) -> None:
    export = (folder / "2/2026-03-helpdesk-export.csv").read_bytes()
    assert b"\x92" in export
    assert b"\x93" in export
    with pytest.raises(UnicodeDecodeError):
        export.decode("utf-8")
    assert (folder / "1/2026-02-helpdesk.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    texts = [row.get("text") or "" for rows in landed.values() for row in rows]
    for sign in ('"', "\n", "&amp;", "Ã", "📦", "  ", "\t"):
        assert any(sign in text for text in texts), sign


def test_the_app_is_a_channel_from_the_second_batch_on(landed: dict[str, Rows]) -> None:
    with_app = {name for name, rows in landed.items() if any(row["channel"] == "app" for row in rows)}

    assert "2/2026-03-chat-and-app.jsonl" in with_app
    assert not any(name.startswith("1/") for name in with_app)
