"""What preprocessing did and what the splits hold, as plain JSON: no times, no hosts, the same for the same rows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from retune.data.columns import in_one_text, texts_of
from retune.data.split import SPLITS

__all__ = ["build_report"]

_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
_BINS = 20


def build_report(
    *,
    landed: "pd.Series[int]",
    kept: pd.DataFrame,
    near_duplicates: list[dict[str, Any]],
    contradictions: list[dict[str, str]],
    inputs: Sequence[str],
    classes: Sequence[str],
    target: str,
    slices: Sequence[str],
    tokens: npt.NDArray[np.int64] | None,
    max_tokens: int,
) -> dict[str, Any]:
    """Rows in and out, per object and per split. `landed`: the object of each landed row.

    rows, kept, duplicates, near_duplicates: counts, with rows = kept + duplicates + near_duplicates, in all and per object.
    objects: those counts by object. splits: per split rows kept, distinct inputs among them, share, groups, labels, slices. lengths:
    quantiles and a histogram of characters, words and tokens. near_duplicate_rows, contradictions: each with both ids.
    """
    text = in_one_text(kept, inputs)
    words = np.fromiter((len(one.split()) for one in texts_of(text)), dtype=np.int64, count=len(text))
    lengths = {"characters": text.str.len().to_numpy(), "words": words, **({} if tokens is None else {"tokens": tokens})}
    columns = list(dict.fromkeys(["group", target, *slices]))
    return {
        "rows": len(landed),
        "kept": len(kept),
        "duplicates": len(landed) - len(kept) - len(near_duplicates),
        "near_duplicates": len(near_duplicates),
        "objects": _per_object(landed, kept, near_duplicates),
        "splits": {
            name: _split(kept.loc[kept["split"] == name, columns], text[kept["split"] == name], len(kept), classes, target, slices)
            for name in SPLITS
        },
        "lengths": {unit: _lengths(values) for unit, values in lengths.items()},
        "max_tokens": max_tokens,
        "longer_than_max_tokens": None if tokens is None else int((tokens > max_tokens).sum()),
        "near_duplicate_rows": near_duplicates,
        "contradictions": contradictions,
    }


def _per_object(landed: "pd.Series[int]", kept: pd.DataFrame, near_duplicates: list[dict[str, Any]]) -> list[dict[str, int]]:
    rows, stay = landed.value_counts(), kept["object"].value_counts()
    near = pd.Series([int(str(row["id"]).split(":")[0]) for row in near_duplicates], dtype="int64").value_counts()
    return [
        {
            "object": int(number),
            "rows": int(rows[number]),
            "kept": int(stay.get(number, 0)),
            "duplicates": int(rows[number] - stay.get(number, 0) - near.get(number, 0)),
            "near_duplicates": int(near.get(number, 0)),
        }
        for number in sorted(rows.index)
    ]


def _split(
    rows: pd.DataFrame, text: "pd.Series[str]", total: int, classes: Sequence[str], target: str, slices: Sequence[str]
) -> dict[str, Any]:
    labels = {name: int((rows[target] == name).sum()) for name in classes}
    return {
        "rows": len(rows),
        "inputs": int(text.nunique()),
        "share": round(len(rows) / total, 4) if total else 0.0,
        "groups": int(rows["group"].nunique()),
        "labels": labels,
        "slices": {name: {str(value): int(count) for value, count in sorted(rows[name].value_counts().items())} for name in slices},
    }


def _lengths(values: "npt.NDArray[Any]") -> dict[str, Any]:
    if not len(values):
        return {"quantiles": {}, "edges": [], "counts": []}
    # A few very long texts would flatten every other bar: they share the last one.
    least = int(values.min())
    top = max(float(np.quantile(values, 0.99)), least + 1.0)
    step = max(1, math.ceil((top - least) / _BINS))
    edges = np.arange(least, top + step, step)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), bins=edges)
    return {
        "quantiles": {f"{quantile:g}": round(float(np.quantile(values, quantile)), 2) for quantile in _QUANTILES},
        "edges": [int(edge) for edge in edges],
        "counts": [int(count) for count in counts],
    }
