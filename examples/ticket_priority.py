"""Writes the landing batches of the prompt ticket_priority: three drops of files, as other systems leave them.

    python examples/ticket_priority.py [--out examples/batches/ticket_priority]

The priority of a ticket is the higher of urgency and anger in batch 1, and the highest of urgency, anger and impact from batch 2 on.
Writes `1/`, `2/` and `3/` with the files, and `expected.json`: what an ingest has to find in each of them. Its counts are

- rows: all rows of the file;
- exact_duplicates_in_file: rows after the first of the same text, label and slices, quarantined rows apart;
- exact_duplicates_of_earlier_files: rows whose text, label and slices stand in a file before it (files in the order of expected.json);
- quarantined: rows by the one reason for which they cannot be used;
- with_mail, with_phone, with_card: rows whose text has a mail address, a telephone number, a valid card number, whatever else they are.
"""

import argparse
import csv
import html
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tickets import (
    CARD_SENTENCES,
    LEVELS,
    MAIL_SENTENCES,
    NEW_PRODUCTS,
    PHONE_SENTENCES,
    PRODUCTS,
    REGIONS,
    Mix,
    card_number,
    curl,
    higher,
    mail,
    phone_number,
    ticket,
)

COLUMNS = ("ticket_id", "text", "label", "channel", "region", "created_at")
MAX_CHARACTERS = 20_000
"""A longer text is quarantined."""
REASONS = ("missing_text", "missing_label", "unknown_label", "unknown_slice_value", "too_long")
TOO_SHORT = "too_short"
"""Reason of the rows that a flaw in their text makes unusable."""
RULES = {
    "urgency_anger": ("urgency", "anger"),
    "urgency_anger_impact": ("urgency", "anger", "impact"),
}
"""Facts whose highest level is the priority."""


@dataclass(frozen=True)
class Row:
    text: str | None
    label: str | None
    channel: str
    region: str
    marks: frozenset[str] = frozenset()
    """What was done to the row: a reason of REASONS or TOO_SHORT, mail, phone, card, duplicate, earlier."""

    def content(self) -> tuple[str | None, str | None, str, str]:
        return self.text, self.label, self.channel, self.region


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
    contradictory: int = 0


@dataclass(frozen=True)
class Landing:
    """One file to write."""

    path: str
    write: Callable[[Path, list[dict[str, str | None]]], None]
    clean: int
    """Rows before the unusable ones and the copies that `dirt` adds."""
    rule: str
    mix: Mix
    channels: dict[str, float]
    regions: tuple[float, float, float]
    start: datetime
    dirt: Dirt


def _separated(delimiter: str, encoding: str, newline: str = "\n") -> Callable[[Path, list[dict[str, str | None]]], None]:
    def write(path: Path, rows: list[dict[str, str | None]]) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, delimiter=delimiter, lineterminator=newline)
        writer.writeheader()
        writer.writerows({k: v or "" for k, v in row.items()} for row in rows)
        path.write_bytes(buffer.getvalue().encode(encoding))

    return write


def _json_lines(path: Path, rows: list[dict[str, str | None]]) -> None:
    """A missing value is null in every other row that has one, and no key in the rest."""
    lines = [
        json.dumps(row if i % 2 else {k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for i, row in enumerate(rows)
    ]
    path.write_bytes(("\n".join(lines) + "\n").encode())


def _parquet(path: Path, rows: list[dict[str, str | None]]) -> None:
    types = {name: pa.timestamp("s") if name == "created_at" else pa.string() for name in COLUMNS}
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
    return Row(made.text, higher(*(made.facts[f] for f in RULES[plan.rule])), channel, region)


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
    slices = [(c, r, level) for level in LEVELS for c in plan.channels for r in REGIONS]
    for i in range(plan.dirt.missing_text):
        channel, region, label = slices[i]
        out.append(Row("   " if i % 3 == 2 else None, label, channel, region, frozenset({"missing_text"})))
    for kind in REASONS[1:]:
        for i in range(getattr(plan.dirt, kind)):
            row = replace(_fresh(rng, plan), marks=frozenset({kind}))
            if kind == "missing_label":
                row = replace(row, label=None)
            elif kind == "unknown_label":
                row = replace(row, label=("urgent", "P1", "critical", "normal", "asap")[i % 5])
            elif kind == "unknown_slice_value":
                row = replace(row, region="latam") if i % 2 == 0 else replace(row, channel="fax")
            else:
                row = replace(row, text=_long_tail(rng, row.text or "", MAX_CHARACTERS + rng.randint(1_000, 4_000)))
            out.append(row)
    return out


def _repeated(rng: random.Random, rows: list[Row], earlier: list[Row], dirt: Dirt) -> list[Row]:
    """Exact copies of rows of this file and of earlier ones, near-duplicates of both, and contradictions."""
    sources = rng.sample(rows, dirt.duplicate + dirt.near + dirt.contradictory)
    copies = [replace(row, marks=row.marks | {"duplicate"}) for row in sources[: dirt.duplicate]]
    near = sources[dirt.duplicate : dirt.duplicate + dirt.near]
    before = rng.sample(earlier, dirt.earlier + dirt.near // 2) if earlier else []
    copies += [replace(row, marks=row.marks | {"earlier"}) for row in before[: dirt.earlier]]
    copies += [replace(row, text=_near(rng, row.text or "")) for row in near + before[dirt.earlier :]]
    copies += [replace(r, label=rng.choice([x for x in LEVELS if x != r.label])) for r in sources[dirt.duplicate + dirt.near :]]
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
    for copy in _repeated(rng, clean, earlier, plan.dirt):  # a copy stands after its original
        original = next((i for i, row in enumerate(rows) if "duplicate" in copy.marks and row.content() == copy.content()), 0)
        rows.insert(rng.randint(original + 1, len(rows)), copy)
    return rows


def _expected(rows: list[Row]) -> dict[str, object]:
    marks = Counter(mark for row in rows for mark in row.marks)
    return {
        "rows": len(rows),
        "exact_duplicates_in_file": marks["duplicate"],
        "exact_duplicates_of_earlier_files": marks["earlier"],
        "quarantined": {reason: marks[reason] for reason in (*REASONS, TOO_SHORT) if marks[reason]},
        "with_mail": marks["mail"],
        "with_phone": marks["phone"],
        "with_card": marks["card"],
    }


def _records(rng: random.Random, rows: list[Row], plan: Landing, first: int) -> list[dict[str, str | None]]:
    moment, out = plan.start, []
    for i, row in enumerate(rows):
        moment += timedelta(seconds=rng.randint(60, 3600))
        values = asdict(row)
        del values["marks"]
        out.append({"ticket_id": f"T{first + i}", **values, "created_at": moment.isoformat()})
    return out


def plans() -> list[Landing]:
    """The files in the order in which they land."""
    outages = Mix((6, 3, 2), (6, 3, 1), (4, 3, 3), (5, 1.5, 3.5), (*PRODUCTS, *NEW_PRODUCTS[:1]), 0.2)
    later = Mix((5, 3, 3), (7, 2, 1), (3, 3, 4), (5, 3, 2), (*PRODUCTS[6:], *NEW_PRODUCTS), 0.3)
    return [
        Landing(
            "1/2026-01-helpdesk.csv",
            _separated(",", "utf-8"),
            clean=230,
            rule="urgency_anger",
            mix=(first := Mix((5, 3, 2), (5, 3, 2), (5, 3, 2), (7, 2, 1), PRODUCTS[:12], 0.15)),
            channels={"email": 5, "phone": 3, "chat": 1, "web": 1},
            regions=(6, 3, 1),
            start=datetime(2026, 1, 5, 8),
            dirt=Dirt(
                mail=9,
                phone=7,
                card=4,
                white_space=5,
                entities=4,
                mojibake=2,
                curly=4,
                quoted=4,
                long=2,
                missing_text=3,
                missing_label=2,
                unknown_label=2,
                unknown_slice_value=1,
                too_long=1,
                duplicate=5,
                near=4,
                contradictory=2,
            ),
        ),
        Landing(
            "1/2026-02-helpdesk.csv",
            _separated(",", "utf-8-sig", "\r\n"),  # a spreadsheet program's CSV: byte order mark and CRLF
            clean=95,
            rule="urgency_anger",
            mix=first,
            channels={"email": 5, "phone": 2, "chat": 2, "web": 2},
            regions=(6, 3, 1),
            start=datetime(2026, 2, 2, 8),
            dirt=Dirt(
                mail=4,
                phone=3,
                card=2,
                white_space=3,
                entities=2,
                mojibake=1,
                curly=2,
                quoted=2,
                long=1,
                missing_text=1,
                missing_label=1,
                unknown_label=1,
                unknown_slice_value=1,
                duplicate=2,
                earlier=3,
                near=2,
                contradictory=1,
            ),
        ),
        Landing(
            "2/2026-03-helpdesk-export.csv",
            _separated(";", "cp1252", "\r\n"),
            clean=660,
            rule="urgency_anger_impact",
            mix=outages,
            channels={"email": 5, "phone": 2, "web": 3},
            regions=(5, 3, 2),
            start=datetime(2026, 3, 2, 8),
            dirt=Dirt(
                mail=24,
                phone=18,
                card=10,
                white_space=14,
                entities=10,
                curly=16,
                quoted=10,
                long=3,
                short=1,
                missing_text=6,
                missing_label=5,
                unknown_label=5,
                unknown_slice_value=3,
                too_long=1,
                duplicate=14,
                near=9,
                contradictory=4,
            ),
        ),
        Landing(
            "2/2026-03-chat-and-app.jsonl",
            _json_lines,
            clean=540,
            rule="urgency_anger_impact",
            mix=outages,
            channels={"chat": 5, "app": 3, "web": 2},
            regions=(4, 3, 3),
            start=datetime(2026, 3, 2, 9),
            dirt=Dirt(
                mail=18,
                phone=14,
                card=8,
                white_space=10,
                entities=8,
                mojibake=6,
                curly=8,
                quoted=6,
                long=3,
                short=1,
                missing_text=5,
                missing_label=4,
                unknown_label=4,
                unknown_slice_value=3,
                duplicate=12,
                earlier=12,
                near=7,
                contradictory=3,
            ),
        ),
        Landing(
            "3/2026-04-crm.tsv",
            _separated("\t", "utf-8"),
            clean=460,
            rule="urgency_anger_impact",
            mix=later,
            channels={"email": 3, "web": 4, "chat": 3},
            regions=(3, 4, 3),
            start=datetime(2026, 4, 1, 8),
            dirt=Dirt(
                mail=16,
                phone=12,
                card=7,
                white_space=9,
                entities=7,
                mojibake=5,
                curly=8,
                quoted=6,
                long=2,
                short=1,
                missing_text=4,
                missing_label=3,
                unknown_label=3,
                unknown_slice_value=2,
                duplicate=9,
                earlier=6,
                near=6,
                contradictory=3,
            ),
        ),
        Landing(
            "3/2026-04-app.parquet",
            _parquet,
            clean=370,
            rule="urgency_anger_impact",
            mix=later,
            channels={"app": 7, "chat": 3},
            regions=(2, 3, 5),
            start=datetime(2026, 4, 1, 9),
            dirt=Dirt(
                mail=12,
                phone=10,
                card=6,
                white_space=6,
                entities=5,
                mojibake=4,
                curly=6,
                quoted=4,
                long=2,
                missing_text=3,
                missing_label=3,
                unknown_label=3,
                unknown_slice_value=2,
                too_long=1,
                duplicate=7,
                earlier=5,
                near=5,
                contradictory=2,
            ),
        ),
    ]


def write_batches(folder: Path) -> None:
    """All files and expected.json."""
    earlier: list[Row] = []
    expected, first = {}, 100_000
    for plan in plans():
        rng = random.Random(f"ticket_priority/{plan.path}")
        rows = _rows(rng, plan, earlier)
        path = folder / plan.path
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.write(path, _records(rng, rows, plan, first))
        expected[plan.path] = _expected(rows)
        first += len(rows)
        earlier += [row for row in rows if not row.marks & {*REASONS, "duplicate", "earlier"} and len(row.text or "") > 20]
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the landing batches of ticket_priority.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "batches" / "ticket_priority")
    arguments = parser.parse_args()
    write_batches(arguments.out)
    print(f"wrote {len(plans())} files to {arguments.out}")


if __name__ == "__main__":
    main()
