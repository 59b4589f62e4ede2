"""Parts: Parquet files named by their content, the same bytes for the same rows."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from retune.data.landing import file_sha256

__all__ = [
    "BETWEEN_INPUTS",
    "BUCKETS",
    "PartWriter",
    "in_order",
    "part_schema",
    "quarantine_schema",
    "read_parts",
    "split_bucket",
    "split_buckets",
]

BUCKETS = 10_000
BETWEEN_INPUTS = "\x1f"
"""Stands between the input texts of a row where they are hashed as one."""
_SPLIT_KEY = b"split_v1"


def split_bucket(texts: Sequence[str]) -> int:
    """0..9999 from a row's raw input texts, frozen for ever: it decides the row's split, before redaction and normalisation."""
    digest = hashlib.blake2b(BETWEEN_INPUTS.join(texts).encode(), digest_size=8, key=_SPLIT_KEY).digest()
    return int.from_bytes(digest, "big") % BUCKETS


def split_buckets(rows: Iterable[bytes]) -> npt.NDArray[np.int64]:
    """`split_bucket` of rows given as their input texts in UTF-8, joined as it joins them."""
    keyed = hashlib.blake2b(digest_size=8, key=_SPLIT_KEY)
    digests = []
    for row in rows:
        digest = keyed.copy()
        digest.update(row)
        digests.append(digest.digest())
    return (np.frombuffer(b"".join(digests), dtype=">u8") % BUCKETS).astype(np.int64)


def part_schema(fields: Iterable[str]) -> pa.Schema:
    return pa.schema([("object", pa.int64()), ("row", pa.int64()), ("bucket", pa.int16()), *((field, pa.string()) for field in fields)])


def quarantine_schema() -> pa.Schema:
    return pa.schema([("object", pa.int64()), ("row", pa.int64()), ("kind", pa.string()), ("reason", pa.string()), ("record", pa.string())])


class PartWriter:
    """Writes frames to a temporary file; `commit` gives it its name. Without a commit, or without rows, nothing stays."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._schema = schema
        handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
        os.close(handle)
        self._path = Path(name)
        self._writer = pq.ParquetWriter(self._path, schema, compression="zstd", compression_level=3, version="2.6", data_page_version="1.0")
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
        self._path.unlink(missing_ok=True)

    def write(self, frame: pd.DataFrame) -> None:
        if len(frame):
            table = pa.Table.from_pandas(frame, schema=self._schema, preserve_index=False).replace_schema_metadata(None)
            self._writer.write_table(table)
            self._rows += len(frame)

    def commit(self) -> str | None:
        """Gives the file its name, which is returned; None where no row was written."""
        self._writer.close()
        if not self._rows:
            return None
        with self._path.open("rb") as stream:
            os.fsync(stream.fileno())
        name = f"{file_sha256(self._path)[:16]}.parquet"
        self._path.chmod(0o644)
        self._path.rename(self._folder / name)
        return name


def read_parts(paths: Iterable[Path]) -> pd.DataFrame:
    """All rows of the parts, ordered by object and row."""
    tables = [pq.read_table(path) for path in sorted(paths)]
    if not tables:
        return pd.DataFrame({"object": [], "row": [], "bucket": []}, dtype="int64")
    frame: pd.DataFrame = pa.concat_tables(tables, promote_options="default").to_pandas()
    return in_order(frame)


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows by object and row; a copy of them only where they do not stand so."""
    number, row = rows["object"].to_numpy(), rows["row"].to_numpy()
    if ((number[:-1] < number[1:]) | ((number[:-1] == number[1:]) & (row[:-1] <= row[1:]))).all():
        return rows.reset_index(drop=True)
    return rows.sort_values(["object", "row"], ignore_index=True)
