"""The trigger form of `retrain_<prompt>`: one field per tuning setting, made from the prompt file's own schema. No DAG."""

import ast
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from airflow.sdk import Param

import retune.config
from retune.config import Prompt, Tune
from retune.errors import ConfigError

__all__ = ["overrides_of", "retrain_form"]

PREFIX = "tune."


def _documented() -> dict[str, str]:
    """Tuning setting -> what stands below it in `Tune`. Pydantic can read that too, at a tenth of a second of every task's start."""
    module = ast.parse(Path(retune.config.__file__).read_text("utf-8"))
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Tune")
    return {
        field.target.id: below.value.value
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


SETTINGS: dict[str, Any] = Tune.model_json_schema()["properties"]
DESCRIPTIONS = _documented()
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def retrain_form(prompt: Prompt) -> dict[str, Param]:
    """Field name -> Param. A tuning field that is left empty keeps the prompt file's value."""
    asked = f" (the prompt file asks in any case; {prompt.promote.approval_hours:g} h to answer)" if prompt.promote.approval else ""
    return {
        "reason": Param("", type=["null", "string"], title="Reason", description="Why; kept in MLflow and the ledger"),
        "force": Param(
            False,
            type="boolean",
            title="Force",
            description="Go through even if the same inputs were decided before",
        ),
        "approval": Param(
            prompt.promote.approval,
            type="boolean",
            title="Ask before promotion",
            description=f"A person approves under Required Actions, or the champion stays{asked}",
        ),
        "patch": Param(
            False,
            type="boolean",
            title="Write a git patch",
            description="data.dvc and dvc.lock of this run as an MLflow artifact that `git apply` takes; nothing is committed",
        ),
        **{f"{PREFIX}{name}": _field(name, schema, prompt) for name, schema in SETTINGS.items()},
        "trials": Param(
            None,
            type=["null", "array"],
            items={"type": "object"},
            title="Trials",
            description='One tuning run each, such as [{}, {"tune.learning_rate": 0.01}]; '
            f"empty: {json.dumps(list(prompt.trials))}, as in the prompt file",
            section="More",
        ),
        "overrides": Param(
            {},
            type=["null", "object"],
            title="Other fields",
            description='Any field of the prompt file to replace, such as {"promote.min_gain": 0.01}',
            section="More",
        ),
    }


def _field(name: str, schema: Mapping[str, Any], prompt: Prompt) -> Param:
    """One tuning setting, with the type, bounds and choices of `retune.config.Tune`."""
    kinds = schema.get("anyOf", [schema])
    types = list(dict.fromkeys([*(kind["type"] for kind in kinds), "null"]))
    limits = {key: value for kind in kinds for key, value in kind.items() if key in BOUNDS}
    allowed = ", ".join(f"{sign} {limits[key]:g}" for key, sign in BOUNDS.items() if key in limits)
    choices = {"enum": [*schema["enum"], None], "values_display": {"null": "as in the prompt file"}} if "enum" in schema else {}
    what = " ".join(DESCRIPTIONS.get(name, "").split()).replace("`", "")
    now = getattr(prompt.tune, name)
    return Param(
        None,
        description=". ".join(filter(None, [what.rstrip("."), allowed, f"Empty: {now}, as in the prompt file"])),
        type=types,
        title=name.replace("_", " ").capitalize(),
        section="Tuning",
        **limits,
        **choices,
    )


def overrides_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt fields that a filled form replaces. Raises ConfigError where one is given twice with different values."""
    fields = {name: value for name, value in params.items() if name.startswith(PREFIX) and value is not None}
    other = dict(params["overrides"] or {})
    for name in fields.keys() & other.keys():
        if fields[name] != other[name]:
            raise ConfigError(f"{name} is {fields[name]} in its own field and {other[name]} under Other fields; leave one empty")
    return fields | other
