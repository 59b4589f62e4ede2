"""Rows of a replaced landing object keep their identity where they are the rows of before.

A row's id, and its place among near-duplicates, follow from when it landed first (object sequence, row number). When an object is replaced,
mostly by itself with rows added, its old rows must not move behind rows that landed later, nor its new rows before them.
"""

import hashlib
import json
from collections import defaultdict, deque
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from retune.data.parts import PartWriter

__all__ = ["keep_identities"]


def keep_identities(old: Path, new: Path, out_dir: Path) -> str | None:
    """Rewrites part `new` so that each row that stands in part `old` too has the object and row number of then.

    Reads batch by batch; what grows with `old` is 16 bytes and two numbers a row. Returns the file name of the part in `out_dir`.
    """
    first: dict[bytes, deque[tuple[int, int]]] = defaultdict(deque)
    for batch in pq.ParquetFile(old).iter_batches():
        frame = batch.to_pandas()
        for digest, place in zip(_digests(frame), zip(frame["object"], frame["row"], strict=True), strict=True):
            first[digest].append(place)
    source = pq.ParquetFile(new)
    with PartWriter(out_dir, source.schema_arrow) as writer:
        for batch in source.iter_batches():
            frame = batch.to_pandas()
            places = [
                first[digest].popleft() if first[digest] else landed
                for digest, landed in zip(_digests(frame), zip(frame["object"], frame["row"], strict=True), strict=True)
            ]
            writer.write(frame.assign(object=[place[0] for place in places], row=[place[1] for place in places]))
        return writer.commit()


def _digests(frame: pd.DataFrame) -> list[bytes]:
    """16 bytes for everything in a row but where it stands."""
    values = frame.drop(columns=["object", "row"]).astype(str).to_numpy()
    return [hashlib.blake2b(json.dumps(list(row)).encode(), digest_size=16).digest() for row in values]
