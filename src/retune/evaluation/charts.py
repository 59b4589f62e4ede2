"""Charts of the decision's page as inline SVG: narrow enough for a phone, coloured by the page's style sheet, the same bytes each time.

Every text that comes from outside goes through `Markup.format`, which escapes it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from retune.evaluation.classification import BINS, bin_sums
from retune.evaluation.predictions import check_predictions

__all__ = ["Bin", "curves_chart", "gain_chart", "reliability", "reliability_chart"]

WIDTH = 340
LEFT, RIGHT = 44, 14
"""Room for the numbers of the vertical axis, and for half a number at the end of the horizontal one."""
SERIES = 8
"""Colours and dashes that the style sheet knows (`.series-0` and on)."""


@dataclass(frozen=True)
class Bin:
    """Rows whose surest label has a probability from `low` to `high`."""

    low: float
    high: float
    rows: int
    confidence: float
    """Mean probability of the surest label; NaN without rows."""
    accuracy: float
    """Share of rows that are right; NaN without rows."""


def reliability(predictions: pd.DataFrame, labels: Sequence[str]) -> list[Bin]:
    """The bins of the calibration error; rows whose probabilities are no finite numbers are in none.

    Raises BadInputError for a frame that is not one, or where finite values are no probabilities.
    """
    check_predictions(predictions, labels)
    sums = bin_sums(predictions, labels)
    sums = sums[np.isfinite(sums).all(axis=1)].sum(axis=0).reshape(3, BINS).T
    return [
        Bin(number / BINS, (number + 1) / BINS, int(rows), *((float(total / rows) for total in totals) if rows else (math.nan, math.nan)))
        for number, (rows, *totals) in enumerate(sums)
    ]


def gain_chart(comparison: Mapping[str, Any], min_gain: float) -> Markup:
    """The gain with its interval, beside no gain and the gain that is asked for."""
    low, high, gain = comparison["low"], comparison["high"], comparison["gain"]
    air = 0.05 * (max(high, min_gain, 0.0) - min(low, 0.0))
    scale = _Scale([low - air, high + air, gain, -air, min_gain + air], RIGHT, WIDTH - RIGHT)
    x = {name: scale(value) for name, value in (("low", low), ("high", high), ("gain", gain), ("zero", 0.0), ("least", min_gain))}
    shapes = [*_bottom(scale, 66, RIGHT)]
    shapes.append(_line("zero", x["zero"], 20, x["zero"], 66))
    if min_gain > 0:
        shapes.append(_line("threshold", x["least"], 20, x["least"], 66))
        side = "start" if x["least"] < WIDTH / 2 else "end"
        shapes.append(_text(x["least"], 13, "min_gain", side))
    shapes += [_line("interval", x["low"], 42, x["high"], 42)]
    shapes += [_line("interval", x[end], 36, x[end], 48) for end in ("low", "high")]
    shapes.append(Markup('<circle class="gain" cx="{}" cy="42" r="5"/>').format(_at(x["gain"])))
    return _svg(f"Gain in {comparison['metric']}: {gain:+.4f}, from {low:+.4f} to {high:+.4f}", 88, shapes)


def curves_chart(curves: Mapping[str, Sequence[tuple[float, float]]], chosen: str) -> Markup:
    """Validation loss by step, a line for each trial. `curves`: trial -> finite points; `chosen`: the trial whose release was judged."""
    points = [point for line in curves.values() for point in line]
    across = _Scale([x for x, _ in points], LEFT, WIDTH - RIGHT)
    up = _Scale([y for _, y in points], 168, 12)
    shapes = [*_bottom(across, 180)]
    for tick in up.ticks():
        shapes += [_line("grid", LEFT, up(tick), WIDTH - RIGHT, up(tick)), _text(LEFT - 6, up(tick) + 4, f"{tick:g}", "end")]
    for number, (name, line) in enumerate(curves.items()):
        places = " ".join(f"{_at(across(x))},{_at(up(y))}" for x, y in line)
        kind = f"line series-{number % SERIES}{' chosen' if name == chosen else ''}"
        shapes.append(Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(kind, places, name))
    return _svg("Validation loss by step, one line for each trial", 202, shapes)


def reliability_chart(bins: Sequence[Bin], title: str) -> Markup:
    """Share of right answers by how sure the release was, with the rows of each bin below. On the dashed line it would be as right as it
    says."""
    across, up = _Scale([0, 1], LEFT, WIDTH - RIGHT), _Scale([0, 1], 196, 12)
    most = max((each.rows for each in bins), default=0) or 1
    shapes = []
    for tick in (0.0, 0.5, 1.0):
        shapes += [_line("grid", LEFT, up(tick), WIDTH - RIGHT, up(tick)), _text(LEFT - 6, up(tick) + 4, f"{tick:g}", "end")]
    shapes.append(_line("ideal", across(0), up(0), across(1), up(1)))
    filled = [each for each in bins if each.rows]
    places = " ".join(f"{_at(across(each.confidence))},{_at(up(each.accuracy))}" for each in filled)
    shapes.append(Markup('<polyline class="line series-0" points="{}"/>').format(places))
    for each in filled:
        said = f"{each.low:g} to {each.high:g}: {each.rows:,} rows, {each.accuracy:.4f} of them right"
        circle = Markup('<circle class="point" cx="{}" cy="{}" r="4"><title>{}</title></circle>')
        shapes.append(circle.format(_at(across(each.confidence)), _at(up(each.accuracy)), said))
        height = max(1.0, 40 * each.rows / most)
        bar = Markup('<rect class="count" x="{}" y="{}" width="{}" height="{}"/>')
        shapes.append(bar.format(_at(across(each.low) + 1), _at(268 - height), _at(across(each.high) - across(each.low) - 2), _at(height)))
        shapes.append(_text((across(each.low) + across(each.high)) / 2, 264 - height, f"{each.rows:,}", "middle"))
    shapes += _bottom(across, 268)
    return _svg(title, 290, shapes)


class _Scale:
    """From values to places: a linear axis that holds all values, with round numbers as its ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        if high - low < 1e-12:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to six round numbers."""
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def _bottom(scale: _Scale, y: float, left: float = LEFT) -> list[Markup]:
    """The horizontal axis with its numbers."""
    shapes = [_line("axis", left, y, WIDTH - RIGHT, y)]
    for tick in scale.ticks():
        shapes += [_line("axis", scale(tick), y, scale(tick), y + 4), _text(scale(tick), y + 17, f"{tick:g}", "middle")]
    return shapes


def _at(place: float) -> str:
    return f"{place:.1f}"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, _at(x1), _at(y1), _at(x2), _at(y2))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(_at(x), _at(y), anchor, text)


def _svg(label: str, height: int, shapes: Iterable[Markup]) -> Markup:
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, label)
    return opening + Markup("").join(shapes) + Markup("</svg>")
