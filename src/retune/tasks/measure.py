"""The task `measure` of `retrain_<prompt>`: what candidate and champion take in time and money, and the prompt's checks on the candidate.

It is never restored: what it times is another thing each time. The models run in a process of their own (`retune.stages.measure`).
"""

import json
import math
import sys
import tempfile
from pathlib import Path

from retune.child import run_child, terminated_as_exception
from retune.config import resolved_yaml
from retune.errors import BadInputError
from retune.evaluation.roles import CANDIDATE, CHAMPION
from retune.recorded import by_release
from retune.records import CheckResult, Lineage, Measured
from retune.tasks.context import Context, Json, read_frame

__all__ = ["ROWS", "check_results", "measure", "measured_of"]

ROWS = 30
"""Test rows that each release answers one by one, the same ones every time."""


def measure(run: Json, evaluated: list[Json], champion: Json | None = None) -> Json:
    """What candidate and champion take, and the checks on the candidate:

        {"measured": role -> `Measured`, a figure that is not known as null,
         "checks": each a `CheckResult`; null for a prompt without a file of checks,
         "champion": release id}

    `champion`: another one than the run's own, after a race was lost. A candidate that is the champion is not measured: whatever came of
    it, the champion stays.
    Raises IntegrityError or BadInputError if a release cannot be loaded, StageError if the process fails. Retry: safe, and measures anew.
    """
    context = Context.of(run)
    candidate = next(e for e in evaluated if e["role"] == CANDIDATE)
    champion = champion or next(e for e in evaluated if e["release"] == run["champion"]["release"])
    if champion["release"] == candidate["release"]:
        print("the candidate is the champion itself: nothing is measured")
        return {"measured": {}, "checks": None, "champion": champion["release"]}
    sides = {CANDIDATE: candidate, CHAMPION: champion}
    with context.failing(run["mlflow_run_id"]):
        found = _in_a_process(context, run, sides)
    measured = {role: _priced(context, role, side, found["measured"][role]) for role, side in sides.items()}
    return {"measured": measured, "checks": found["checks"], "champion": champion["release"]}


def measured_of(found: Json) -> dict[str, Measured]:
    """Role -> figures, from what `measure` returned. A null is NaN, but for the cost: that is None without a price."""
    measured = {}
    for role, figures in found["measured"].items():
        known = {name: math.nan if value is None else value for name, value in figures.items()}
        measured[role] = Measured.from_json({**known, "cost": figures["cost"]})
    return measured


def check_results(run: Json, found: Json) -> list[CheckResult] | None:
    """What `measure` found of each check of the run: nothing where one was not run; None where the run has no checks."""
    if run["checks"] is None:
        return None
    results = [CheckResult.from_json(result) for result in found["checks"] or []]
    return results if [result.name for result in results] == [check["name"] for check in run["checks"]["checks"]] else []


def _in_a_process(context: Context, run: Json, sides: dict[str, Json]) -> Json:
    prompt, workspaces = context.prompt, context.workspaces
    with terminated_as_exception(), tempfile.TemporaryDirectory(prefix="retune-measure-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        for role, side in sides.items():
            workspaces.fetch(Lineage.from_json(side["lineage"]), f"artifacts/{prompt.name}/release", folder / role)
        test = read_frame(context, Lineage.from_json(sides[CANDIDATE]["lineage"]), f"artifacts/{prompt.name}/dataset/test.parquet")
        if test.empty:
            raise BadInputError(f"{prompt.name}: the test split is empty, so that no prediction can be timed")
        test.sample(min(ROWS, len(test)), random_state=0).to_parquet(folder / "rows.parquet", index=False)
        asked = {"releases": {role: side["release"] for role, side in sides.items()}, "checks": run["checks"]}
        (folder / "measure.json").write_text(json.dumps(asked), "utf-8")
        (folder / f"{prompt.name}.yaml").write_text(resolved_yaml(prompt), "utf-8")
        code = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
        environment = {**context.environment(), **code, "RETUNE_PROJECT": str(context.settings.project)}
        run_child("measure", [sys.executable, "-m", "retune.stages.measure", prompt.name], folder, environment, workspaces.log)
        found: Json = json.loads((folder / "measured.json").read_text("utf-8"))
        return found


def _priced(context: Context, role: str, side: Json, figures: Json) -> Json:
    """A `Measured` as JSON, with what tuning the release took on the machine that executed it, as its own lineage tells."""
    lineage: Lineage | None = Lineage.from_json(side["lineage"])
    if role == CHAMPION:  # that lineage has the run's data and code; the release's own stands in the ledger
        known = by_release(context.prompt.name, context.ledger.entries()).get(side["release"])
        lineage = known.lineage if known else None
    seconds = lineage.machines.get("tune", {}).get("seconds") if lineage else None
    price = context.settings.device_hour_price
    return {**figures, "tune_seconds": seconds, "cost": None if price is None or seconds is None else seconds / 3600 * price}
