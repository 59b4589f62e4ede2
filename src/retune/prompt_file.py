"""A prompt file changed by as little as makes it say something else: comments, order and style of whoever wrote it stay."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from retune.config import Prompt, resolved_yaml

__all__ = ["rewritten"]


def rewritten(text: str, prompt: Prompt) -> str:
    """The prompt file `text` with the fields replaced in which `prompt` differs; every field written out where that cannot be."""
    try:
        before = Prompt.model_validate(yaml.safe_load(text))
        if before == prompt:
            return text
        style = YAML()
        style.preserve_quotes = True
        style.width = 10_000
        style.indent(mapping=2, sequence=4, offset=2)
        document = style.load(text)
        for path, value in _changes(before.model_dump(mode="json"), prompt.model_dump(mode="json")):
            *sections, field = path
            place = document
            for section in sections:
                place = place.setdefault(section, {})
            place[field] = value
        out = io.StringIO()
        style.dump(document, out)
        if Prompt.model_validate(yaml.safe_load(out.getvalue())) == prompt:
            return out.getvalue()
    except (ValidationError, yaml.YAMLError, YAMLError, AttributeError, TypeError):
        pass  # wrong for now, or a section in its short form: every field is written out
    return resolved_yaml(prompt)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and new value of each field that differs, the innermost ones."""
    for name, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(name), dict) and value.keys() >= before[name].keys():
            yield from _changes(before[name], value, (*at, name))
        elif name not in before or before[name] != value:
            yield (*at, name), value
