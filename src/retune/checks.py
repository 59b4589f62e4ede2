"""Prompt tests in git: `prompts/<prompt>.checks.yaml`, inputs with what must be true of the output. Light imports only.

    checks:
    - name: an outage is high             # left out: "check 1" and so on
      input: {text: The whole office is down.}
      equals: high
    - input: {text: Take your time.}
      same_as: {text: take your time}     # another input with the same output
      required: false                     # reported, and rejects nothing

All errors of a file are reported at once, each as `CHECK: FIELD: must be ..., got VALUE`.
"""

import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from retune.config import Prompt, read_yaml
from retune.errors import ConfigError, RetuneError
from retune.evaluation.rouge import ROUGE, rouge
from retune.policy import Section
from retune.records import CheckResult
from retune.text import split_references

__all__ = ["Check", "Checks", "checks_file", "load_checks", "read_checks", "run_checks"]

ASSERTIONS = ("equals", "one_of", "contains", "regex", "rouge", "same_as", "differs_from", "latency_under")
TIMED = 5
"""Predictions that a latency is the median of, after the one that the other assertions look at."""
SHOWN = 120
"""Characters of a text in a reason; the rest is cut."""

Answer = Callable[[Mapping[str, str]], str]
"""Input fields -> the predicted label or text."""


class RougeAtLeast(Section):
    """How near a text must come to one that a person wrote."""

    reference: str
    """Several, one to a line: the nearest counts."""
    at_least: Annotated[float, Field(gt=0, le=1)]
    figure: Literal["rouge1", "rouge2", "rougeL"] = "rougeL"


class Check(Section):
    """One input, and at least one assertion about its output: the predicted label, or the text without outer white space."""

    name: str
    input: dict[str, str]
    """Every field of the template, and no other."""
    equals: str | None = None
    one_of: Annotated[tuple[str, ...] | None, Field(min_length=1)] = None
    contains: str | None = None
    """Case counts; `regex: (?i)...` ignores it."""
    regex: str | None = None
    """Found anywhere in the output, as Python's re.search does."""
    rouge: RougeAtLeast | None = None
    same_as: dict[str, str] | None = None
    """Another input, whose output must be the same."""
    differs_from: dict[str, str] | None = None
    """Another input, whose output must be another."""
    latency_under: Annotated[float | None, Field(gt=0)] = None
    """Milliseconds: median of a few predictions of this row alone, after a first one."""
    required: bool = True
    """False: reported only."""

    @field_validator("input", "same_as", "differs_from")
    @classmethod
    def _fields_of_template(cls, value: dict[str, str] | None, info: ValidationInfo) -> dict[str, str] | None:
        wanted = _prompt(info).inputs if info.context else None
        if value is not None and wanted is not None and set(value) != set(wanted):
            raise ValueError(f"must hold the template's fields {', '.join(wanted)}, got {', '.join(value) or 'none'}")
        return value

    @field_validator("equals", "one_of")
    @classmethod
    def _labels_of_prompt(cls, value: str | tuple[str, ...] | None, info: ValidationInfo) -> str | tuple[str, ...] | None:
        labels = _prompt(info).labels if info.context else {}
        named = [value] if isinstance(value, str) else value or ()
        if labels and (unknown := [label for label in named if label not in labels]):
            raise ValueError(f"must be among the labels {', '.join(labels)}, got {', '.join(map(repr, unknown))}")
        return value

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"must be a regular expression, got {value!r}: {error}") from None
        return value

    @model_validator(mode="after")
    def _asserts(self) -> Self:
        if all(getattr(self, name) is None for name in ASSERTIONS):
            raise ValueError(f"must assert something: {', '.join(ASSERTIONS)}")
        return self


class Checks(Section):
    """A file of checks."""

    checks: tuple[Check, ...]

    @model_validator(mode="before")
    @classmethod
    def _numbered(cls, raw: Any) -> Any:
        """A name for each check that has none."""
        if not isinstance(raw, dict) or not isinstance(raw.get("checks"), list):
            return raw
        named = [{"name": f"check {n}", **check} if isinstance(check, dict) else check for n, check in enumerate(raw["checks"], 1)]
        return {**raw, "checks": named}

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if not self.checks:
            raise ValueError("checks must hold at least one check; a prompt without any has no such file")
        names = [check.name for check in self.checks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names must differ, got twice: {', '.join(map(repr, twice))}")
        return self


def checks_file(prompts: Path, name: str) -> Path:
    """Where a prompt's checks stand, beside its own file."""
    return prompts / f"{name}.checks.yaml"


def read_checks(prompts: Path, prompt: Prompt) -> Checks | None:
    """The checks of a prompt; None where it has no file of them. Raises ConfigError as `load_checks` does."""
    path = checks_file(prompts, prompt.name)
    return load_checks(path, prompt) if path.exists() else None


def load_checks(path: Path, prompt: Prompt) -> Checks:
    """Reads one file of checks. Raises ConfigError with every error of the file at once, by check and field."""
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"no checks can be read from {path}: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping with `checks`, a list; got {type(raw).__name__}")
    try:
        return Checks.model_validate(raw, context={"prompt": prompt})
    except ValidationError as error:
        lines = [_line(item, raw) for item in error.errors()]
        raise ConfigError(f"{path}: {len(lines)} error(s)\n  " + "\n  ".join(lines)) from None


def run_checks(checks: Checks, answer: Answer) -> list[CheckResult]:
    """What became of each check, in the file's order. A row that cannot be answered fails its check, and no other."""
    results = []
    for check in checks.checks:
        try:
            passed, reason = _run(check, answer)
        except RetuneError as error:
            passed, reason = False, f"No answer: {error}."
        results.append(CheckResult(check.name, check.required, passed, reason))
    return results


def _run(check: Check, answer: Answer) -> tuple[bool, str]:
    said = answer(check.input)
    found = _found(check, said, answer)
    failed = [expected for passed, expected in found if not passed]
    return not failed, f"Expected {'; '.join(failed or [text for _, text in found])}; got {_shown(said)}."


def _found(check: Check, said: str, answer: Answer) -> list[tuple[bool, str]]:
    """Each assertion of a check: whether it holds, and what was expected, with the figures."""
    found: list[tuple[bool, str]] = []
    if check.equals is not None:
        found.append((said == check.equals.strip(), _shown(check.equals)))
    if check.one_of is not None:
        found.append((said in {text.strip() for text in check.one_of}, f"one of {', '.join(map(_shown, check.one_of))}"))
    if check.contains is not None:
        found.append((check.contains in said, f"a text with {_shown(check.contains)}"))
    if check.regex is not None:
        found.append((re.search(check.regex, said) is not None, f"a text that matches {_shown(check.regex)}"))
    if check.rouge is not None:
        asked = check.rouge
        score = rouge(said, split_references(asked.reference.strip()))[ROUGE.index(asked.figure)]
        expected = f"{asked.figure} of at least {asked.at_least:g} against {_shown(asked.reference)}, which is {score:.4f}"
        found.append((score >= asked.at_least, expected))
    if check.same_as is not None:
        other = answer(check.same_as)
        found.append((said == other, f"what {_shown(check.same_as)} gets, {_shown(other)}"))
    if check.differs_from is not None:
        other = answer(check.differs_from)
        found.append((said != other, f"something else than {_shown(check.differs_from)} gets, {_shown(other)}"))
    if check.latency_under is not None:
        median = statistics.median(_milliseconds(check.input, answer) for _ in range(TIMED))
        found.append((median < check.latency_under, f"an answer within {check.latency_under:g} ms, it took {median:.1f} ms"))
    return found


def _milliseconds(row: Mapping[str, str], answer: Answer) -> float:
    begun = time.perf_counter()
    answer(row)
    return (time.perf_counter() - begun) * 1000


def _shown(value: str | Mapping[str, str]) -> str:
    text = repr(value if isinstance(value, str) else " / ".join(value.values()))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 2]}…{text[-1]}"


def _prompt(info: ValidationInfo) -> Prompt:
    prompt: Prompt = (info.context or {})["prompt"]
    return prompt


def _line(item: Any, raw: Mapping[str, Any]) -> str:
    """An error of pydantic's, with the check's name in place of its number."""
    location = list(item["loc"])
    if len(location) > 1 and location[0] == "checks":
        check = raw["checks"][location[1]]
        location[:2] = [str(check.get("name", f"check {location[1] + 1}")) if isinstance(check, dict) else f"check {location[1] + 1}"]
    message, value = item["msg"].removeprefix("Value error, "), item["input"]
    got = "" if isinstance(value, dict | list | BaseModel) or "got " in message else f", got {value!r}"
    return f"{': '.join(map(str, location)) or 'file'}: {message}{got}"
