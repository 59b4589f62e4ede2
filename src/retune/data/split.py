"""Which split a row belongs to: by its frozen bucket alone, so that it never moves."""

import hashlib

import numpy as np
import pandas as pd

from retune.config import Splits
from retune.data.parts import BUCKETS

__all__ = ["SPLITS", "split_names"]

SPLITS = ("train", "validation", "test")


def split_names(buckets: "pd.Series[int]", splits: Splits) -> "pd.Series[str]":
    """`train` below the first share of the buckets, then `validation`, then `test`; a salt deals the buckets anew."""
    thresholds = [round(splits.train * BUCKETS), round((splits.train + splits.validation) * BUCKETS)]
    places = buckets.to_numpy()
    if splits.salt:
        order = sorted(range(BUCKETS), key=lambda bucket: hashlib.sha256(f"{splits.salt}\0{bucket}".encode()).digest())
        places = np.argsort(order)[places]
    return pd.Series(np.array(SPLITS)[np.searchsorted(thresholds, places, side="right")], index=buckets.index, dtype="str")
