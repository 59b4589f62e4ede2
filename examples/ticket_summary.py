"""Writes the landing batches of the prompt ticket_summary: two drops of a file each.

    python examples/ticket_summary.py [--out examples/batches/ticket_summary]

A summary names product, problem and request in one line: the base model has been asked for two of them at a time, never for all three.
Some tickets stand there twice, the second time as somebody else put it: a further reference.
Writes `1/` and `2/` with the files, and `expected.json` (see `landing.py`).
"""

import argparse
import random
from datetime import datetime
from pathlib import Path

from landing import Answers, Dirt, Landing, json_lines, separated, write_batches
from tickets import NEW_PRODUCTS, PRODUCTS, Mix

NAME = "ticket_summary"


def summary(facts: dict[str, str]) -> str:
    return f"{facts['product']}: {facts['problem']}; customer wants {facts['request']}"


def request_first(_: random.Random, written: str) -> str:
    """The same in another order."""
    product_and_problem, _, request = written.partition("; ")
    return f"{request}; {product_and_problem}"


SUMMARIES = Answers("summary", summary, request_first, ("router: arrived damaged; customer wants a repair",))


def plans() -> list[Landing]:
    """The files in the order in which they land."""
    return [
        Landing(
            "1/2026-01-summaries.csv",
            separated(",", "utf-8"),
            clean=280,
            answers=SUMMARIES,
            mix=Mix(products=PRODUCTS[:12], held=0.15),
            channels={"email": 5, "phone": 3, "chat": 1, "web": 1},
            regions=(6, 3, 1),
            start=datetime(2026, 1, 5, 8),
            dirt=Dirt(
                mail=8,
                phone=6,
                card=3,
                white_space=4,
                entities=3,
                mojibake=2,
                curly=4,
                quoted=4,
                long=2,
                short=1,
                missing_text=3,
                missing_label=3,
                unknown_slice_value=2,
                too_long=1,
                duplicate=5,
                near=4,
                other=28,
            ),
        ),
        Landing(
            "2/2026-03-summaries.jsonl",
            json_lines,
            clean=200,
            answers=SUMMARIES,
            mix=Mix(products=(*PRODUCTS, *NEW_PRODUCTS[:1]), held=0.25),
            channels={"email": 3, "chat": 4, "web": 2, "app": 2},
            regions=(4, 3, 3),
            start=datetime(2026, 3, 2, 8),
            dirt=Dirt(
                mail=8,
                phone=6,
                card=3,
                white_space=4,
                entities=3,
                mojibake=2,
                curly=4,
                quoted=4,
                long=2,
                short=1,
                missing_text=3,
                missing_label=3,
                unknown_slice_value=2,
                duplicate=5,
                earlier=6,
                near=4,
                other=28,
            ),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the landing batches of ticket_summary.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "batches" / NAME)
    arguments = parser.parse_args()
    write_batches(NAME, plans(), arguments.out)
    print(f"wrote {len(plans())} files to {arguments.out}")


if __name__ == "__main__":
    main()
