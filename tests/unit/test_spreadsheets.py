"""Text that begins with =, +, - or @ is run as a formula by a spreadsheet that opens a CSV with it: so none holds text."""

import re
from pathlib import Path

from retune.stages.tune import COLUMNS

ROOT = Path(__file__).parents[2]


def test_the_only_csv_that_is_written_holds_numbers() -> None:
    places = [path for folder in ("src", "plugins", "dags") for path in (ROOT / folder).rglob("*.py")]
    writing = re.compile(r"\bto_csv\(|\bcsv\.(?:writer|DictWriter)\(|\bwrite_csv\(|\bto_excel\(|text/csv")
    assert [path.relative_to(ROOT).as_posix() for path in places if writing.search(path.read_text("utf-8"))] == [
        "src/retune/stages/tune.py"
    ]
    assert tuple(COLUMNS) == ("step", "epoch", "train_loss", "validation_loss", "learning_rate")
