"""Files of checks, and what each assertion says of an output."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from retune.checks import Checks, load_checks, read_checks, run_checks
from retune.config import Prompt, load_prompt, load_prompts
from retune.errors import BadInputError, ConfigError

ROOT = Path(__file__).parents[2]
PRIORITY = load_prompt(ROOT / "prompts/ticket_priority.yaml")
SUMMARY = load_prompt(ROOT / "prompts/ticket_summary.yaml")


def write(folder: Path, checks: Any) -> Path:
    path = folder / "ticket_priority.checks.yaml"
    path.write_text(yaml.safe_dump(checks), "utf-8")
    return path


def refused(folder: Path, checks: Any, prompt: Prompt = PRIORITY) -> str:
    with pytest.raises(ConfigError) as error:
        load_checks(write(folder, checks), prompt)
    return str(error.value)


def reversed_text(row: Mapping[str, str]) -> str:
    """The release of these tests: answers a text with itself, backwards."""
    if row["text"] == "too long":
        raise BadInputError("row 0: prompt too long")
    return row["text"][::-1].strip()


def outcome(**assertions: Any) -> tuple[bool, str]:
    (result,) = run_checks(Checks.model_validate({"checks": [{"input": {"text": "cba"}, **assertions}]}), reversed_text)
    return result.passed, result.reason


@pytest.mark.parametrize("name", ["ticket_priority", "ticket_summary"])
def test_the_example_prompts_have_checks_and_they_are_no_prompts(name: str) -> None:
    checks = read_checks(ROOT / "prompts", load_prompts(ROOT / "prompts")[name])
    assert checks is not None
    assert {check.required for check in checks.checks} == {True, False}


def test_a_prompt_may_have_no_file(tmp_path: Path) -> None:
    assert read_checks(tmp_path, PRIORITY) is None
    with pytest.raises(ConfigError, match=r"no checks can be read from .*ticket_priority\.checks\.yaml"):
        load_checks(tmp_path / "ticket_priority.checks.yaml", PRIORITY)


def test_a_check_without_a_name_is_known_by_its_number(tmp_path: Path) -> None:
    checks = load_checks(write(tmp_path, {"checks": [{"input": {"text": "a"}, "equals": label} for label in ("low", "high")]}), PRIORITY)
    assert [check.name for check in checks.checks] == ["check 1", "check 2"]
    assert Checks.model_validate(checks.model_dump(mode="json")) == checks, "as a run pins it"


def test_all_errors_of_a_file_are_told_at_once_by_check_and_field(tmp_path: Path) -> None:
    told = refused(
        tmp_path,
        {
            "checks": [
                {"name": "an outage", "input": {"text": "a", "title": "b"}, "equals": "urgent"},
                {"input": {"text": "a"}, "one_of": ["low", "lowest"], "expect": "low"},
                {"name": "times", "input": {"text": "a"}, "latency_under": 0, "regex": "("},
                {"name": "nothing asked", "input": {"text": "a"}},
                {"name": "words", "input": {"text": "a"}, "rouge": {"reference": "a", "at_least": 2}},
                {"name": "pair", "input": {"text": "a"}, "same_as": {"body": "a"}},
            ]
        },
    )
    assert "ticket_priority.checks.yaml: 9 error(s)" in told
    for line in (
        "an outage: input: must hold the template's fields text, got text, title",
        "an outage: equals: must be among the labels low, medium, high, got 'urgent'",
        "check 2: one_of: must be among the labels low, medium, high, got 'lowest'",
        "check 2: expect: Extra inputs are not permitted, got 'low'",
        "times: latency_under: Input should be greater than 0, got 0",
        "times: regex: must be a regular expression, got '('",
        "nothing asked: must assert something: equals, one_of,",
        "words: rouge: at_least: Input should be less than or equal to 1, got 2",
        "pair: same_as: must hold the template's fields text, got body",
    ):
        assert f"\n  {line}" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "must be a mapping with `checks`, a list; got list"),
        ({}, "checks: Field required"),
        ({"checks": []}, "file: checks must hold at least one check"),
        ({"checks": ["low"]}, "check 1: Input should be a valid dictionary"),
        ({"checks": [{"equals": "low"}]}, "check 1: input: Field required"),
        ({"checks": [{"name": "a", "input": {"text": "a"}, "equals": "low"}] * 2}, "file: names must differ, got twice: 'a'"),
        ({"checks": [{"input": {"text": 1}, "equals": "low"}]}, "check 1: input: text: Input should be a valid string, got 1"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, content: Any, told: str) -> None:
    assert told in refused(tmp_path, content)


def test_what_is_no_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.checks.yaml"
    path.write_text("checks: [", "utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_checks(path, PRIORITY)


def test_any_text_may_be_expected_of_a_prompt_without_labels(tmp_path: Path) -> None:
    checks = load_checks(write(tmp_path, {"checks": [{"input": {"text": "a"}, "equals": "router: slow"}]}), SUMMARY)
    assert checks.checks[0].equals == "router: slow"


@pytest.mark.parametrize(
    ("assertion", "passed", "expected"),
    [
        ({"equals": "abc\n"}, True, "'abc"),
        ({"equals": "ab"}, False, "'ab'"),
        ({"one_of": ["x", "abc"]}, True, "one of 'x', 'abc'"),
        ({"one_of": ["x", "ab"]}, False, "one of 'x', 'ab'"),
        ({"contains": "bc"}, True, "a text with 'bc'"),
        ({"contains": "BC"}, False, "a text with 'BC'"),
        ({"regex": "(?i)^A.C$"}, True, "a text that matches '(?i)^A.C$'"),
        ({"regex": "^b"}, False, "a text that matches '^b'"),
        ({"same_as": {"text": " cba"}}, True, "what ' cba' gets, 'abc'"),
        ({"same_as": {"text": "cb"}}, False, "what 'cb' gets, 'bc'"),
        ({"differs_from": {"text": "cb"}}, True, "something else than 'cb' gets, 'bc'"),
        ({"differs_from": {"text": "cba"}}, False, "something else than 'cba' gets, 'abc'"),
        ({"latency_under": 5000}, True, "an answer within 5000 ms, it took 0.0 ms"),
    ],
)
def test_an_assertion_says_what_was_expected_and_what_came(assertion: dict[str, Any], passed: bool, expected: str) -> None:
    found, reason = outcome(**assertion)
    assert found is passed
    assert reason.startswith(f"Expected {expected}")
    assert reason.endswith("; got 'abc'.")


def test_rouge_is_that_of_the_nearest_reference() -> None:
    """Of the words b c against a b c, two of two and two of three: F = 4 / 5."""
    assert outcome(input={"text": "c b"}, rouge={"reference": "x y\na b c", "at_least": 0.8}) == (
        True,
        "Expected rougeL of at least 0.8 against 'x y\\na b c', which is 0.8000; got 'b c'.",
    )
    assert outcome(input={"text": "c b"}, rouge={"reference": "a b c", "at_least": 0.81})[0] is False
    assert outcome(input={"text": "b c"}, rouge={"reference": "a b c", "at_least": 0.6})[0] is False, "the order counts for rougeL"
    assert outcome(input={"text": "b c"}, rouge={"reference": "a b c", "at_least": 0.6, "figure": "rouge1"})[0] is True


def test_several_assertions_must_all_hold_and_the_failed_ones_are_told() -> None:
    assert outcome(contains="b", regex="x", equals="y") == (False, "Expected 'y'; a text that matches 'x'; got 'abc'.")


def test_a_slow_release_fails_its_latency() -> None:
    checks = Checks.model_validate({"checks": [{"input": {"text": "a"}, "latency_under": 1}]})
    (result,) = run_checks(checks, lambda row: time.sleep(0.002) or "a")
    assert not result.passed
    assert "an answer within 1 ms, it took" in result.reason


def test_a_row_that_cannot_be_answered_fails_its_check_alone() -> None:
    checks = {"checks": [{"input": {"text": "too long"}, "equals": "x"}, {"input": {"text": "a"}, "equals": "a", "required": False}]}
    first, second = run_checks(Checks.model_validate(checks), reversed_text)
    assert (first.passed, first.reason, first.required) == (False, "No answer: row 0: prompt too long.", True)
    assert (second.passed, second.required) == (True, False)


def test_a_long_text_is_cut_in_the_reason() -> None:
    assert len(outcome(equals="x" * 1000)[1]) < 200
