"""What a figure is made of, and how two things are timed against each other."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypedDict

__all__ = ["Row", "interleaved", "of_rounds", "ratios", "say", "skipped"]

_BEGUN = time.perf_counter()


class Row(TypedDict):
    """value, low, high: median, least and most of the rounds; None where the unit says why nothing was measured."""

    figure: str
    case: str
    value: float | None
    low: float | None
    high: float | None
    unit: str


def of_rounds(figure: str, case: str, values: Sequence[float], unit: str) -> Row:
    return {"figure": figure, "case": case, "value": statistics.median(values), "low": min(values), "high": max(values), "unit": unit}


def ratios(figure: str, case: str, slow: Sequence[float], fast: Sequence[float]) -> Row:
    """slow / fast, round by round."""
    return of_rounds(figure, case, [a / b for a, b in zip(slow, fast, strict=True)], "x")


def skipped(figure: str, case: str, reason: str) -> Row:
    return {"figure": figure, "case": case, "value": None, "low": None, "high": None, "unit": f"not measured: {reason}"}


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each function, in turn; warm_up: after a call of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(0 if warm_up else 1, rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"[{time.perf_counter() - _BEGUN:5.0f} s] {text}", flush=True)
