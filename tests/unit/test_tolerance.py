"""Distances between a release and the same made again, computed by hand."""

import pandas as pd
import pytest
import torch

from retune.tolerance import curve_difference, other_machine, other_versions, tensor_difference, within

FINE = {"splits_with_other_rows": 0.0, "tuned_absolute": 9.0, "tuned_relative": 0.01, "curve_loss": 0.01}


def test_tensors_differ_by_their_furthest_value() -> None:
    recorded, made = torch.tensor([[1.0, -4.0], [2.0, 0.0]]), torch.tensor([[1.0, -4.5], [2.25, 0.0]])
    same = torch.ones(1)
    found = tensor_difference({"a": recorded, "b": same}, {"a": made, "b": same})
    assert found == {"tuned_absolute": 0.5, "tuned_relative": 0.125}


def test_tensors_of_another_shape_cannot_be_compared() -> None:
    nothing = {"tuned_absolute": None, "tuned_relative": None}
    assert tensor_difference({"a": torch.ones(2, 3)}, {"a": torch.ones(1, 3)}) == nothing
    assert tensor_difference({"a": torch.ones(2, 3)}, {}) == nothing
    assert tensor_difference({}, {}) == {"tuned_absolute": 0.0, "tuned_relative": 0.0}


def test_curves_differ_by_their_furthest_loss() -> None:
    recorded = pd.DataFrame({"step": [0, 1], "train_loss": [None, 2.0], "validation_loss": [1.0, 0.5]})
    assert curve_difference(recorded, recorded.assign(train_loss=[None, 2.25])) == {"curve_loss": 0.25}
    assert curve_difference(recorded, recorded.assign(step=[0, 2])) == {"curve_loss": None}


def test_a_curve_without_training_has_one_loss() -> None:
    recorded = pd.DataFrame({"step": [0], "train_loss": [None], "validation_loss": [1.0]})
    assert curve_difference(recorded, recorded) == {"curve_loss": 0.0}


@pytest.mark.parametrize(
    "worse",
    [{}, {"splits_with_other_rows": 1.0}, {"tuned_relative": 0.011}, {"curve_loss": 0.011}, {"tuned_relative": None}],
    ids=str,
)
def test_the_tolerance_holds_for_rows_tensors_and_losses(worse: dict[str, float | None]) -> None:
    assert within({**FINE, **worse}) is (not worse)


def test_what_is_unlike_is_named_with_both_values() -> None:
    assert other_machine({"threads": 1, "gpus": []}, {"threads": 4, "gpus": [], "new": 1}) == ["threads here 4, recorded 1"]
    assert other_machine({}, {"threads": 4}) == []


def test_a_lock_may_pin_a_version_per_platform() -> None:
    numpy = "numpy==2.3 ; python_version < '3.12' \\\n    --hash=sha256:00\nnumpy==2.4 ; python_version >= '3.12'\n"
    lock = f"{numpy}pandas==3.1.1 \\\nabsent==1\n"
    assert other_versions(lock, {"numpy": "2.4", "pandas": "3.1.1"}.get) == []
    assert other_versions(lock, {"numpy": "2.5", "pandas": "3.1.0"}.get) == [
        "numpy 2.5 is installed, the lock names 2.3 or 2.4",
        "pandas 3.1.0 is installed, the lock names 3.1.1",
    ]
