"""How far a release that was made again is from the recorded one, and what is unlike between the two machines. Pure arithmetic."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch

__all__ = ["TOLERANCE", "Differences", "curve_difference", "other_machine", "other_versions", "tensor_difference", "within"]

TOLERANCE = 0.01
"""Largest difference that an unlike machine may make: of a tuned tensor relative to its largest value, of a loss in nats."""
Differences = dict[str, float | None]
"""Name -> largest difference; None where the two cannot be compared."""
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def within(differences: Differences) -> bool:
    """Whether an unlike machine explains the differences: the same rows, and what was tuned and losses within TOLERANCE."""
    rows, tuned, loss = (differences[name] for name in ("splits_with_other_rows", "tuned_relative", "curve_loss"))
    return rows == 0 and tuned is not None and tuned <= TOLERANCE and loss is not None and loss <= TOLERANCE


def tensor_difference(recorded: Mapping[str, torch.Tensor], made: Mapping[str, torch.Tensor]) -> Differences:
    """Largest absolute difference of what was tuned, and the same relative to the largest recorded value. Each by name."""
    if not recorded and not made:
        return {"tuned_absolute": 0.0, "tuned_relative": 0.0}
    if {name: x.shape for name, x in recorded.items()} != {name: x.shape for name, x in made.items()}:
        return {"tuned_absolute": None, "tuned_relative": None}
    absolute = max(float((x - made[name]).abs().max()) for name, x in recorded.items())
    return {"tuned_absolute": absolute, "tuned_relative": absolute / max(float(x.abs().max()) for x in recorded.values())}


def curve_difference(recorded: pd.DataFrame, made: pd.DataFrame) -> Differences:
    """Largest difference of a training or validation loss, in nats; None if the curves have other steps."""
    if not recorded["step"].equals(made["step"]):
        return {"curve_loss": None}
    gaps = [(recorded[loss] - made[loss]).abs().max() for loss in ("train_loss", "validation_loss") if recorded[loss].notna().any()]
    return {"curve_loss": float(max(gaps, default=0.0))}


def other_machine(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A sentence for each property in which this machine is not the recorded one."""
    return [f"{name} here {here[name]}, recorded {value}" for name, value in recorded.items() if name in here and here[name] != value]


def other_versions(lock: str, installed: Callable[[str], str | None]) -> list[str]:
    """A sentence for each package of a requirements.lock that is installed in another version. A lock may pin one per platform."""
    pinned: dict[str, set[str]] = {}
    for name, version in _PINNED.findall(lock):
        pinned.setdefault(name, set()).add(version)
    found = {name: installed(name) for name in pinned}
    return [
        f"{name} {found[name]} is installed, the lock names {' or '.join(sorted(versions))}"
        for name, versions in pinned.items()
        if found[name] is not None and found[name] not in versions
    ]
