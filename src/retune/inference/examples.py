"""The training rows that a release of method few_shot holds in place of anything tuned, one JSON object to a line.

An example is the row's input fields and its target, as text, and its `id` where the row has one. The examples of a row are chosen among
them by `Encoder.prompts`, wherever a row is read: validation, evaluation, serving.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from retune.config import Prompt, canonical_json
from retune.errors import BadInputError
from retune.inference.encoding import Rows, field_text, records, references

__all__ = ["ID", "example_lines", "example_rows", "read_examples"]

ID = "id"


def example_rows(prompt: Prompt, rows: Rows) -> list[dict[str, str]]:
    """The examples that training rows give: the first row of each distinct input, with the first of its references.

    Raises BadInputError naming the row whose field is missing or whose target is none of the labels.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for number, row in enumerate(records(rows)):
        inputs = {field: field_text(number, row, field) for field in prompt.inputs}
        known = {ID: str(row[ID])} if ID in row else {}
        found.setdefault(tuple(inputs.values()), known | inputs | {prompt.target: references(number, row, prompt)[0]})
    return list(found.values())


def example_lines(examples: Sequence[Mapping[str, str]]) -> bytes:
    """What the file of a release holds: the same examples give the same bytes."""
    return b"".join(canonical_json(example) + b"\n" for example in examples)


def read_examples(prompt: Prompt, content: bytes) -> list[dict[str, str]]:
    """The examples that `example_lines` wrote. Raises ValueError for a file that it did not write, or for another prompt's."""
    examples: list[Any] = [json.loads(line) for line in content.decode().split("\n")[:-1]]
    fields = {*prompt.inputs, prompt.target}
    for number, example in enumerate(examples):
        if not isinstance(example, dict) or {*example, ID} != {*fields, ID} or not all(isinstance(x, str) for x in example.values()):
            raise ValueError(f"line {number + 1} must hold the texts of {', '.join(sorted(fields))}")
    try:
        written = example_lines(example_rows(prompt, examples))
    except BadInputError as error:
        raise ValueError(str(error)) from None
    if written != content or not examples:
        raise ValueError("must hold at least one row, each input once, in canonical JSON")
    return examples
