"""The process of task `measure`: two releases take turns at answering single rows, and one of them takes the prompt's checks.

No stage of dvc.yaml: what it times is another thing each time, and is never restored. `retune.tasks.measure` lays its folder.

Reads::

    <prompt>.yaml      resolved
    measure.json       releases: role -> release id, the first takes the checks; checks: as in `retune.checks.Checks`, or null
    <role>/            the release folder of each role
    rows.parquet       test rows, in the order in which they are answered

Writes::

    measured.json      measured: role -> latency_p50_ms, latency_p95_ms, tokens_per_second, tuned_parameters;
                       checks: each a `CheckResult`, or null

RETUNE_PROJECT: the project, in which relative base models are found. Raises: IntegrityError if a release or its base model is not what was
recorded. Retry: safe.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from retune.checks import Checks, run_checks
from retune.config import Prompt, canonical_json
from retune.inference.base_model import BaseModel, open_base_model
from retune.inference.predictor import Predictor
from retune.inference.release import Release, read_release
from retune.stages import run_stage

__all__ = ["take_turns"]

WARM_UP = 3
"""Rows that each release answers before its time counts."""


def main(prompt: Prompt) -> None:  # noqa: ARG001 - each release has a prompt file of its own
    asked = json.loads(Path("measure.json").read_text("utf-8"))
    releases = {role: read_release(Path(role), release) for role, release in asked["releases"].items()}
    predictors = _loaded(releases)
    measured: dict[str, dict[str, Any]] = {
        role: {**figures, "tuned_parameters": sum(tensor.numel() for tensor in releases[role].tensors.values())}
        for role, figures in take_turns(predictors, pd.read_parquet("rows.parquet")).items()
    }
    for role, figures in measured.items():
        print(f"{role}: " + "  ".join(f"{name} {value:,.1f}" for name, value in figures.items()), flush=True)
    results = None
    if asked["checks"] is not None:
        first = next(iter(predictors.values()))
        results = [result.to_json() for result in run_checks(Checks.model_validate(asked["checks"]), first.answer)]
        for result in results:
            print(f"{'passed' if result['passed'] else 'failed'}: {result['name']}: {result['reason']}", flush=True)
    Path("measured.json").write_text(json.dumps({"measured": measured, "checks": results}), "utf-8")


def take_turns(predictors: Mapping[str, Predictor], rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Role -> figures of a `Measured` that are timed, from predictions of one row at a time.

    The releases answer the same rows, each row one after the other and the first of them in turn, so that whatever else the machine does
    falls on all alike.
    """
    roles = list(predictors)
    seconds: dict[str, list[float]] = {role: [] for role in roles}
    tokens = dict.fromkeys(roles, 0)
    answered = [{str(field): value for field, value in row.items()} for row in rows.to_dict("records")]
    warm_up = answered[:WARM_UP]
    for turn, row in enumerate([*warm_up, *answered]):
        for role in roles if turn % 2 == 0 else reversed(roles):
            begun = time.perf_counter()
            said = predictors[role].answer(row)
            took = time.perf_counter() - begun
            if turn >= len(warm_up):
                seconds[role].append(took)
                tokens[role] += _tokens(predictors[role], row, said)
    return {
        role: {
            "latency_p50_ms": 1000 * float(np.quantile(seconds[role], 0.5)),
            "latency_p95_ms": 1000 * float(np.quantile(seconds[role], 0.95)),
            "tokens_per_second": tokens[role] / sum(seconds[role]),
        }
        for role in roles
    }


def _tokens(predictor: Predictor, row: Mapping[str, Any], said: str) -> int:
    """Tokens of a row's rendered template, and of its output; a label counts as its words."""
    written = predictor.prompt.labels.get(said, said)
    return predictor.prompt_tokens([row])[0] + len(predictor.base.tokenizer.encode(written, add_special_tokens=False))


def _loaded(releases: Mapping[str, Release]) -> dict[str, Predictor]:
    """A predictor of each release; those on the same base model share it."""
    folders = [Path(p) for p in os.environ.get("RETUNE_BASE_MODELS", "").split(os.pathsep) if p]
    bases: dict[bytes, BaseModel] = {}
    predictors = {}
    for role, release in releases.items():
        reference = release.prompt.base_model
        key = canonical_json(reference.model_dump(mode="json"))
        if key not in bases:
            bases[key] = open_base_model(reference, Path(os.environ["RETUNE_PROJECT"]), folders)
        predictors[role] = Predictor.of(release, bases[key])
    return predictors


if __name__ == "__main__":
    run_stage(main, "{}.yaml")
