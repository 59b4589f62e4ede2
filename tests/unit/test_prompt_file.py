"""A prompt file takes a run's overrides and stays as its writer left it otherwise."""

import difflib
from pathlib import Path
from typing import Any

import pytest
import yaml

from retune.config import Prompt, load_prompt, override, resolved_yaml
from retune.prompt_file import rewritten

EXAMPLE = Path(__file__).parents[2] / "prompts/ticket_priority.yaml"


def changed(overrides: dict[str, Any]) -> tuple[str, list[str]]:
    """The example with overrides, and the lines that are not in the example."""
    text, prompt = EXAMPLE.read_text("utf-8"), override(load_prompt(EXAMPLE), overrides)
    result = rewritten(text, prompt)
    assert Prompt.model_validate(yaml.safe_load(result)) == prompt
    return result, [line for line in difflib.ndiff(text.splitlines(), result.splitlines()) if line[0] in "+-"]


def test_the_same_prompt_keeps_every_byte() -> None:
    assert changed({})[0] == EXAMPLE.read_text("utf-8")


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ({"tune.seed": 14}, ["-   seed: 13", "+   seed: 14"]),
        (
            {"labels.low": " calm"},
            ['- labels: {low: " low", medium: " medium", high: " high"}', '+ labels: {low: " calm", medium: " medium", high: " high"}'],
        ),
        ({"generation.max_new_tokens": 4}, ["+ generation:", "+   max_new_tokens: 4"]),
        ({"template": "{text}\nPriority:"}, ["-   Ticket: {text}", "-   Answer:", "+   {text}", "+   Priority:"]),
    ],
    ids=str,
)
def test_an_override_changes_its_own_line(overrides: dict[str, Any], lines: list[str]) -> None:
    assert changed(overrides)[1] == lines


def test_a_file_that_is_wrong_for_now_gives_way_to_every_field() -> None:
    prompt = load_prompt(EXAMPLE)
    for text in ("tune: [", "name: other", "", EXAMPLE.read_text("utf-8").replace("epochs: 8", "epochs: none")):
        assert rewritten(text, prompt) == resolved_yaml(prompt)


def test_a_section_in_its_short_form_still_says_the_prompt() -> None:
    text = EXAMPLE.read_text("utf-8").replace(
        "source:\n  path: .retune/landing/ticket_priority\n  columns: {text: text, label: label}\n  max_characters: 20000\n", "source: a\n"
    )
    prompt = override(load_prompt(EXAMPLE), {"tune.seed": 14})
    assert Prompt.model_validate(yaml.safe_load(rewritten(text, prompt))) == prompt
