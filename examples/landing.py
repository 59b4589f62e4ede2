"""Landing files of support tickets with an answer each, as other systems leave them: with copies, contacts and rows that nobody can use.

`write_batches` writes the files and `expected.json`: what an ingest has to find in each of them. Its counts are

- rows: all rows of the file;
- exact_duplicates_in_file: rows after the first of the same text, answer and slices, quarantined rows apart;
- exact_duplicates_of_earlier_files: rows whose text, answer and slices stand in a file before it (files in the order of expected.json);
- other_answers: rows whose text stands in the file before with another answer, whatever else they are;
- quarantined: rows by the one reason for which they cannot be used;
- with_mail, with_phone, with_card: rows whose text has a mail address, a telephone number, a valid card number, whatever else they are.
"""

import csv
import html
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tickets import (
    CARD_SENTENCES,
    MAIL_SENTENCES,
    PHONE_SENTENCES,
    REGIONS,
    Mix,
    card_number,
    curl,
    mail,
    phone_number,
    ticket,
)

Write = Callable[[Path, list[dict[str, str | None]]], None]
MAX_CHARACTERS = 20_000
"""A longer text is quarantined."""
REASONS = ("missing_text", "missing_label", "unknown_label", "unknown_slice_value", "too_long")
TOO_SHORT = "too_short"
"""Reason of the rows that a flaw in their text makes unusable."""


@dataclass(frozen=True)
class Row:
    text: str | None
    answer: str | None
    channel: str
    region: str
    marks: frozenset[str] = frozenset()
    """What was done to the row: a reason of REASONS or TOO_SHORT, mail, phone, card, duplicate, earlier, other."""

    def content(self) -> tuple[str | None, str | None, str, str]:
        return self.text, self.answer, self.channel, self.region


@dataclass(frozen=True)
class Dirt:
    """How many rows of a file have each flaw. No row has two; a copy has the flaw of its original, too."""

    mail: int = 0
    phone: int = 0
    card: int = 0
    white_space: int = 0
    entities: int = 0
    mojibake: int = 0
    curly: int = 0
    quoted: int = 0
    long: int = 0
    short: int = 0
    missing_text: int = 0
    missing_label: int = 0
    unknown_label: int = 0
    unknown_slice_value: int = 0
    too_long: int = 0
    duplicate: int = 0
    earlier: int = 0
    near: int = 0
    other: int = 0
    """Texts that stand there again with another answer."""


@dataclass(frozen=True)
class Answers:
    """What a file's rows have as their target."""

    column: str
    of: Callable[[dict[str, str]], str]
    """The answer to a ticket with these facts."""
    other: Callable[[random.Random, str], str]
    """Another answer to a text."""
    some: tuple[str, ...]
    """Answers of rows without a text."""


@dataclass(frozen=True)
class Landing:
    """One file to write."""

    path: str
    write: Write
    clean: int
    """Rows before the unusable ones and the copies that `dirt` adds."""
    answers: Answers
    mix: Mix
    channels: dict[str, float]
    regions: tuple[float, float, float]
    start: datetime
    dirt: Dirt


def separated(delimiter: str, encoding: str, newline: str = "\n") -> Write:
    def write(path: Path, rows: list[dict[str, str | None]]) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter, lineterminator=newline)
        writer.writeheader()
        writer.writerows({k: v or "" for k, v in row.items()} for row in rows)
        path.write_bytes(buffer.getvalue().encode(encoding))

    return write


def json_lines(path: Path, rows: list[dict[str, str | None]]) -> None:
    """A missing value is null in every other row that has one, and no key in the rest."""
    lines = [
        json.dumps(row if i % 2 else {k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for i, row in enumerate(rows)
    ]
    path.write_bytes(("\n".join(lines) + "\n").encode())


def parquet(path: Path, rows: list[dict[str, str | None]]) -> None:
    types = {name: pa.timestamp("s") if name == "created_at" else pa.string() for name in rows[0]}
    parsed = [{**row, "created_at": datetime.fromisoformat(row["created_at"] or "")} for row in rows]
    pq.write_table(pa.Table.from_pylist(parsed, schema=pa.schema(types)), path, compression="zstd")


def _spoil_white_space(rng: random.Random, text: str) -> str:
    middle = text.replace(". ", rng.choice((".  ", ".\t", ".   ")), 1)
    return rng.choice((" ", "\n", "  ")) + middle + rng.choice((" ", "\n\n", " \t"))


def _spoil_entities(rng: random.Random, text: str) -> str:
    escaped = html.escape(curl(text)).replace("’", "&rsquo;").replace("“", "&ldquo;").replace("”", "&rdquo;")
    return escaped + rng.choice((" Tom &amp; Co.", " Th&eacute;r&egrave;se", " &lt;sent from my tablet&gt;", " Q&amp;A no. 4&nbsp;read."))


def _spoil_mojibake(rng: random.Random, text: str) -> str:
    """UTF-8 that someone before us has read as cp1252."""
    signed = curl(text) + rng.choice((" Grüße", " à bientôt", " – José", " merci, Zoë"))
    return signed.encode().decode("cp1252", errors="replace")


def _quote(rng: random.Random, text: str) -> str:
    return text + rng.choice(
        ('\n\n"Your case is closed", you wrote.\nIt is not.', '\n> "We are on it", says your mail', ' The "help" page; see "A, B"')
    )


def _long_tail(rng: random.Random, text: str, characters: int) -> str:
    """The message, and below it a pasted log of about so many characters."""
    causes = ("connection reset by peer", "no route to host", "checksum differs", "retry with back-off", "cache miss", "session expired")
    lines = [text, "", "Here is the log:"]
    while sum(map(len, lines)) + len(lines) < characters:
        lines.append(
            f"[worker {rng.randint(1, 9)}] {rng.choice(('warn', 'error', 'info'))}: {rng.choice(causes)} (code {rng.randint(10, 99)})"
        )
    return "\n".join(lines)


def _near(rng: random.Random, text: str) -> str:
    """The same message with a word or a sign changed."""
    changes = (
        lambda t: t.rstrip(".!") + "!",
        lambda t: t + " Thanks.",
        lambda t: t.replace("I ", "We ", 1) if "I " in t else t + " Hello?",
        lambda t: "Again: " + t,
        lambda t: t.replace(".", " .", 1),
    )
    return rng.choice([changed for change in changes if (changed := change(text)) != text])


def _fresh(rng: random.Random, plan: Landing) -> Row:
    channel = rng.choices(list(plan.channels), list(plan.channels.values()))[0]
    region = rng.choices(REGIONS, plan.regions)[0]
    made = ticket(rng, plan.mix, channel, region)
    return Row(made.text, plan.answers.of(made.facts), channel, region)


def _spoiled(rng: random.Random, rows: list[Row], dirt: Dirt) -> list[Row]:
    """The rows with flaws inside their text, each on a row of its own."""
    contacts = {
        "mail": (MAIL_SENTENCES, mail),
        "phone": (PHONE_SENTENCES, phone_number),
        "card": (CARD_SENTENCES, lambda r, _: card_number(r)),
    }
    spoil: dict[str, Callable[[random.Random, str], str]] = {
        "white_space": _spoil_white_space,
        "entities": _spoil_entities,
        "mojibake": _spoil_mojibake,
        "curly": lambda _, text: curl(text) + " It’s a “déjà vu” – really…",
        "quoted": _quote,
        "long": lambda r, text: _long_tail(r, text, r.randint(2500, 5000)),
        "short": lambda r, _: r.choice(("?", "ok", "!!", "hm")),
    }
    rows, untouched = list(rows), list(range(len(rows)))
    rng.shuffle(untouched)
    for kind, (sentences, make) in contacts.items():
        for _ in range(getattr(dirt, kind)):
            i = untouched.pop()
            text = f"{rows[i].text} {rng.choice(sentences).format(x=make(rng, rows[i].region))}"
            rows[i] = replace(rows[i], text=text, marks=frozenset({kind}))
    for kind, change in spoil.items():
        for _ in range(getattr(dirt, kind)):
            i = untouched.pop()
            rows[i] = replace(rows[i], text=change(rng, rows[i].text or ""), marks=frozenset({TOO_SHORT} if kind == "short" else ()))
    return rows


def _unusable(rng: random.Random, plan: Landing) -> list[Row]:
    """Rows that are to be quarantined, each for one reason, no two alike."""
    out: list[Row] = []
    slices = [(c, r, answer) for answer in plan.answers.some for c in plan.channels for r in REGIONS]
    for i in range(plan.dirt.missing_text):
        channel, region, answer = slices[i]
        out.append(Row("   " if i % 3 == 2 else None, answer, channel, region, frozenset({"missing_text"})))
    for kind in REASONS[1:]:
        for i in range(getattr(plan.dirt, kind)):
            row = replace(_fresh(rng, plan), marks=frozenset({kind}))
            if kind == "missing_label":
                row = replace(row, answer=None)
            elif kind == "unknown_label":
                row = replace(row, answer=("urgent", "P1", "critical", "normal", "asap")[i % 5])
            elif kind == "unknown_slice_value":
                row = replace(row, region="latam") if i % 2 == 0 else replace(row, channel="fax")
            else:
                row = replace(row, text=_long_tail(rng, row.text or "", MAX_CHARACTERS + rng.randint(1_000, 4_000)))
            out.append(row)
    return out


def _repeated(rng: random.Random, rows: list[Row], earlier: list[Row], plan: Landing) -> list[Row]:
    """Exact copies of rows of this file and of earlier ones, near-duplicates of both, and texts with another answer."""
    dirt = plan.dirt
    sources = rng.sample(rows, dirt.duplicate + dirt.near + dirt.other)
    copies = [replace(row, marks=row.marks | {"duplicate"}) for row in sources[: dirt.duplicate]]
    near = sources[dirt.duplicate : dirt.duplicate + dirt.near]
    before = rng.sample(earlier, dirt.earlier + dirt.near // 2) if earlier else []
    copies += [replace(row, marks=row.marks | {"earlier"}) for row in before[: dirt.earlier]]
    copies += [replace(row, text=_near(rng, row.text or "")) for row in near + before[dirt.earlier :]]
    for row in sources[dirt.duplicate + dirt.near :]:
        copies.append(replace(row, answer=plan.answers.other(rng, row.answer or ""), marks=row.marks | {"other"}))
    return copies


def _rows(rng: random.Random, plan: Landing, earlier: list[Row]) -> list[Row]:
    """All rows of a file in the order in which they stand."""
    seen, clean = {row.text for row in earlier}, []
    while len(clean) < plan.clean:
        row = _fresh(rng, plan)
        if row.text not in seen:
            clean.append(row)
            seen.add(row.text)
    clean = _spoiled(rng, clean, plan.dirt)
    rows = clean + _unusable(rng, plan)
    rng.shuffle(rows)
    for copy in _repeated(rng, clean, earlier, plan):  # a copy stands after its original
        original = next((i for i, row in enumerate(rows) if "duplicate" in copy.marks and row.content() == copy.content()), 0)
        rows.insert(rng.randint(original + 1, len(rows)), copy)
    return rows


def _expected(rows: list[Row]) -> dict[str, object]:
    marks = Counter(mark for row in rows for mark in row.marks)
    return {
        "rows": len(rows),
        "exact_duplicates_in_file": marks["duplicate"],
        "exact_duplicates_of_earlier_files": marks["earlier"],
        "other_answers": marks["other"],
        "quarantined": {reason: marks[reason] for reason in (*REASONS, TOO_SHORT) if marks[reason]},
        "with_mail": marks["mail"],
        "with_phone": marks["phone"],
        "with_card": marks["card"],
    }


def _records(rng: random.Random, rows: list[Row], plan: Landing, first: int) -> list[dict[str, str | None]]:
    moment, out = plan.start, []
    for i, row in enumerate(rows):
        moment += timedelta(seconds=rng.randint(60, 3600))
        content = zip(("text", plan.answers.column, "channel", "region"), row.content(), strict=True)
        out.append({"ticket_id": f"T{first + i}", **dict(content), "created_at": moment.isoformat()})
    return out


def write_batches(name: str, plans: list[Landing], folder: Path) -> None:
    """All files of a prompt, in the order in which they land, and expected.json."""
    earlier: list[Row] = []
    expected, first = {}, 100_000
    for plan in plans:
        rng = random.Random(f"{name}/{plan.path}")
        rows = _rows(rng, plan, earlier)
        path = folder / plan.path
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.write(path, _records(rng, rows, plan, first))
        expected[plan.path] = _expected(rows)
        first += len(rows)
        earlier += [row for row in rows if not row.marks & {*REASONS, "duplicate", "earlier"} and len(row.text or "") > 20]
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
