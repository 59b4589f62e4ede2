"""Which split a row belongs to: by its frozen bucket alone, so that it never moves."""

import numpy as np
import pandas as pd

from retune.data.parts import BUCKETS

__all__ = ["SPLITS", "split_names"]

SPLITS = ("train", "validation", "test")


def split_names(buckets: "pd.Series[int]", train: float, validation: float) -> "pd.Series[str]":
    """`train` below the first share of the buckets, then `validation`, then `test`."""
    thresholds = [round(train * BUCKETS), round((train + validation) * BUCKETS)]
    places = np.searchsorted(thresholds, buckets.to_numpy(), side="right")
    return pd.Series(np.array(SPLITS)[places], index=buckets.index, dtype="str")
