"""Writes the landing batches of the prompt ticket_priority: three drops of files, as other systems leave them.

    python examples/ticket_priority.py [--out examples/batches/ticket_priority]

The priority of a ticket is the higher of urgency and anger in batch 1, and the highest of urgency, anger and impact from batch 2 on.
Writes `1/`, `2/` and `3/` with the files, and `expected.json` (see `landing.py`).
"""

import argparse
import random
from datetime import datetime
from pathlib import Path

from landing import Answers, Dirt, Landing, json_lines, parquet, separated, write_batches
from tickets import LEVELS, NEW_PRODUCTS, PRODUCTS, Mix, higher

NAME = "ticket_priority"


def _highest_of(*facts: str) -> Answers:
    """The priority is the highest level of some facts; another answer is any other level."""

    def other(rng: random.Random, label: str) -> str:
        return rng.choice([level for level in LEVELS if level != label])

    return Answers("label", lambda found: higher(*(found[fact] for fact in facts)), other, LEVELS)


HIGHER_OF_TWO = _highest_of("urgency", "anger")
HIGHEST_OF_THREE = _highest_of("urgency", "anger", "impact")


def plans() -> list[Landing]:
    """The files in the order in which they land."""
    outages = Mix((6, 3, 2), (6, 3, 1), (4, 3, 3), (5, 1.5, 3.5), (*PRODUCTS, *NEW_PRODUCTS[:1]), 0.2)
    later = Mix((5, 3, 3), (7, 2, 1), (3, 3, 4), (5, 3, 2), (*PRODUCTS[6:], *NEW_PRODUCTS), 0.3)
    return [
        Landing(
            "1/2026-01-helpdesk.csv",
            separated(",", "utf-8"),
            clean=230,
            answers=HIGHER_OF_TWO,
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
                other=2,
            ),
        ),
        Landing(
            "1/2026-02-helpdesk.csv",
            separated(",", "utf-8-sig", "\r\n"),  # a spreadsheet program's CSV: byte order mark and CRLF
            clean=95,
            answers=HIGHER_OF_TWO,
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
                other=1,
            ),
        ),
        Landing(
            "2/2026-03-helpdesk-export.csv",
            separated(";", "cp1252", "\r\n"),
            clean=660,
            answers=HIGHEST_OF_THREE,
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
                other=4,
            ),
        ),
        Landing(
            "2/2026-03-chat-and-app.jsonl",
            json_lines,
            clean=540,
            answers=HIGHEST_OF_THREE,
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
                other=3,
            ),
        ),
        Landing(
            "3/2026-04-crm.tsv",
            separated("\t", "utf-8"),
            clean=460,
            answers=HIGHEST_OF_THREE,
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
                other=3,
            ),
        ),
        Landing(
            "3/2026-04-app.parquet",
            parquet,
            clean=370,
            answers=HIGHEST_OF_THREE,
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
                other=2,
            ),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the landing batches of ticket_priority.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "batches" / NAME)
    arguments = parser.parse_args()
    write_batches(NAME, plans(), arguments.out)
    print(f"wrote {len(plans())} files to {arguments.out}")


if __name__ == "__main__":
    main()
