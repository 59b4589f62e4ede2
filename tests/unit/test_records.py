import json
import math

from retune.records import Evaluation


def test_figures_that_are_no_numbers_pass_through_strict_json_as_such() -> None:
    """Airflow refuses NaN between tasks, and the gate must see it all the same."""
    slices = {"channel": {"web": {"accuracy": math.inf, "rows": 2}}}
    made = Evaluation("r", 2, "t", "e", {"accuracy": 1.0, "log_loss": math.nan}, slices=slices, sets={"typos": {"changed": 0.5}})
    found = Evaluation.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert math.isnan(found.metrics["log_loss"])
    assert math.isnan(found.slices["channel"]["web"]["accuracy"])
    assert (found.metrics["accuracy"], found.slices["channel"]["web"]["rows"], found.sets) == (1.0, 2, {"typos": {"changed": 0.5}})
