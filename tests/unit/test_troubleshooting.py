"""Messages that docs/troubleshooting.md quotes are messages that the code has."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
PLACEHOLDER = "\0"
OWN = re.findall(r"^ *- `([^`]+)`", GUIDE, re.MULTILINE)
AIRFLOWS = re.findall(r"^- Airflow: `([^`]+)`", GUIDE, re.MULTILINE)
MLFLOWS = re.findall(r"^- MLflow: `([^`]+)` … `([^`]+)`", GUIDE, re.MULTILINE)


@cache
def messages() -> frozenset[str]:
    """Every text in the code, its placeholders and those of logging replaced by one character."""
    found = set()
    for folder in ("src", "dags", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(re.sub(r"%[ds]|%r", PLACEHOLDER, node.value))
    return frozenset(found)


def says(message: str, text: str) -> bool:
    """Whether the text has the message's pieces in their order, and a placeholder where it has … between two of them."""
    pattern = f".*{PLACEHOLDER}.*".join(map(re.escape, message.strip("…").split("…")))
    return re.search(pattern, text, re.DOTALL) is not None


@pytest.mark.parametrize("message", OWN)
def test_a_quoted_message_is_one_of_the_code(message: str) -> None:
    assert max(map(len, message.split("…"))) >= 10, "too little is quoted to find it by"
    assert any(says(message, text) for text in messages())


def test_a_message_that_the_code_does_not_have_is_found_out() -> None:
    (known,) = [message for message in OWN if message.startswith("the checkpoint was not stored")]
    assert any(says(known, text) for text in messages())
    assert not any(says(known.replace("not stored", "not kept"), text) for text in messages())
    assert not any(says(known.replace("…", ""), text) for text in messages()), "the placeholder is part of it"


def test_messages_of_airflow_and_mlflow_are_theirs() -> None:
    assert (len(AIRFLOWS), len(MLFLOWS)) == (1, 1)
    for package, pieces in (("airflow.sdk", AIRFLOWS), ("mlflow.store", MLFLOWS[0])):
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        text = "".join(file.read_text("utf-8") for file in Path(spec.submodule_search_locations[0]).rglob("*.py"))
        assert [piece for piece in pieces if piece not in text] == []


def test_every_symptom_is_in_the_list_at_the_top() -> None:
    headings = [heading.lower() for heading in re.findall(r"^## (.+)$", GUIDE, re.MULTILINE)]
    anchors = [re.sub(r"[^a-z -]", "", heading).replace(" ", "-") for heading in headings]
    assert re.findall(r"^- \[.+\]\(#(.+)\)$", GUIDE, re.MULTILINE) == anchors
