"""The trigger form: fields from the prompt file's schema, and what a filled form replaces."""

import json
import subprocess
import sys
from typing import Any

import pytest
from parsing import ROOT

from retune.config import Tune

FORM = """
import json, sys
from pathlib import Path
from retune.config import load_prompt
from retune_forms import overrides_of, retrain_form
form = retrain_form(load_prompt(Path("prompts/ticket_priority.yaml")))
fields = {name: {"default": param.value, "description": param.description, **param.schema} for name, param in form.items()}
filled = []
for values in json.loads(sys.argv[1]):
    try:
        filled.append(overrides_of({**{name: param.value for name, param in form.items()}, **values}))
    except Exception as error:
        filled.append(f"{type(error).__name__}: {error}")
print("RESULT" + json.dumps([fields, filled]))
"""


@pytest.fixture(scope="module")
def form(airflow_environ: dict[str, str]) -> Any:
    def ask(*values: dict[str, Any]) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", FORM, json.dumps(values)], capture_output=True, text=True, env=airflow_environ, cwd=ROOT, timeout=120
        )
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
        assert line is not None, done.stderr[-3000:]
        return json.loads(line.removeprefix("RESULT"))

    return ask


def test_fields_have_titles_bounds_and_choices_and_an_empty_form_replaces_nothing(form: Any) -> None:
    fields, filled = form({})
    assert {name.removeprefix("tune.") for name in fields if name.startswith("tune.")} == set(Tune.model_fields)
    assert all(field["title"] and field["description"] for field in fields.values())
    assert fields["tune.num_virtual_tokens"] == {
        "default": None,
        "description": "P, rows of the soft prompt or prefix. >= 1, <= 1000. Empty: 20, as in the prompt file",
        "type": ["integer", "null"],
        "title": "Num virtual tokens",
        "section": "Tuning",
        "minimum": 1,
        "maximum": 1000,
    }
    assert fields["tune.learning_rate"]["exclusiveMinimum"] == 0
    assert fields["tune.init"]["enum"] == ["text", "sampled_vocabulary", "random", None]
    assert filled == [{}]


def test_a_filled_form_replaces_its_fields_and_a_contradiction_is_refused(form: Any) -> None:
    _, filled = form(
        {"tune.learning_rate": 0.02, "overrides": {"promote.min_gain": 0.1}},
        {"tune.seed": 1, "overrides": {"tune.seed": 1}},
        {"tune.seed": 1, "overrides": {"tune.seed": 2}},
        {"overrides": None},
    )
    assert filled == [
        {"tune.learning_rate": 0.02, "promote.min_gain": 0.1},
        {"tune.seed": 1},
        "ConfigError: tune.seed is 1 in its own field and 2 under Other fields; leave one empty",
        {},
    ]
