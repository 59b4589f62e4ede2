"""The tasks of a retrain run called one after the other, as Airflow would: real stages, DVC, MLflow and store, no scheduler."""

from typing import Any

from retune.records import Trigger
from retune.tasks import retrain, verdict
from retune.tasks.measure import measure
from retune.tasks.resolve import resolve


def trigger(run_id: str, reason: str = "", run_type: str = "manual", by: str = "tester") -> dict[str, Any]:
    return Trigger("test", run_id, run_type, by, reason, f"http://airflow.test/runs/{run_id}").to_json()


def loop(name: str, run_id: str, answer: dict[str, Any] | None = None, **wanted: Any) -> dict[str, Any] | None:
    """What `promote` returned, or `decide` where that was the end; None if there was nothing to do."""
    run = resolve(name, trigger(run_id, run_type=wanted.pop("run_type", "manual")), **wanted)
    if run is None:
        return None
    run = retrain.preprocess(run)
    tuned = [retrain.tune(run, trial) for trial in retrain.plan(run)]
    evaluated = [retrain.evaluate(run, contender) for contender in retrain.select(run, tuned)]
    measured = measure(run, evaluated)
    decided = verdict.decide(run, evaluated, measured)
    return verdict.promote(run, evaluated, measured, decided, answer) if decided["verdict"] == "PROMOTE" else decided
