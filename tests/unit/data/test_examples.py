"""The example batches hold what their expected.json says."""

import json
from pathlib import Path

import pytest

from retune.config import load_prompt
from retune.data.ingest import ingest_object
from retune.data.landing import open_objects
from retune.data.parts import read_parts

ROOT = Path(__file__).parents[3]
BATCHES = ROOT / "examples" / "batches" / "ticket_priority"
EXPECTED = json.loads((BATCHES / "expected.json").read_text()) if BATCHES.is_dir() else {}


@pytest.mark.parametrize("key", EXPECTED)
def test_an_example_file_is_accounted_for(tmp_path: Path, key: str) -> None:
    expected = EXPECTED[key]
    prompt = load_prompt(ROOT / "prompts" / "ticket_priority.yaml")
    [item] = [item for item in open_objects(str(BATCHES)).objects if item.key == key]
    result = ingest_object(prompt, item, 0, tmp_path)
    assert (result.rows, result.duplicates) == (expected["rows"], expected["exact_duplicates_in_file"])
    assert result.quarantined == expected["quarantined"]
    texts = read_parts([tmp_path / str(result.part)])["text"]
    for kind in ("mail", "phone", "card"):
        assert texts.str.contains(f"<{kind}>").sum() <= expected[f"with_{kind}"]
        assert result.redacted[kind] == expected[f"with_{kind}"]
