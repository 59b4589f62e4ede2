"""A replaced object's old rows keep their identity."""

from pathlib import Path

import pandas as pd

from retune.data.identity import keep_identities
from retune.data.parts import PartWriter, part_schema


def write(folder: Path, rows: list[tuple[int, int, str, str]]) -> Path:
    with PartWriter(folder, part_schema(["text", "label"])) as writer:
        frame = pd.DataFrame(rows, columns=["object", "row", "text", "label"])
        writer.write(frame.assign(bucket=[len(text) for text in frame["text"]]))
        name = writer.commit()
    assert name is not None
    return folder / name


def test_old_rows_keep_their_place_and_new_ones_get_the_new_object(tmp_path: Path) -> None:
    old = write(tmp_path, [(1, 1, "a", "low"), (1, 2, "bb", "high"), (1, 3, "ccc", "low")])
    new = write(tmp_path, [(7, 1, "new", "low"), (7, 2, "a", "low"), (7, 3, "ccc", "high"), (7, 4, "bb", "high")])
    name = keep_identities(old, new, tmp_path)
    assert name is not None
    kept = pd.read_parquet(tmp_path / name)
    assert list(zip(kept["object"], kept["row"], kept["text"], kept["label"], strict=True)) == [
        (7, 1, "new", "low"),
        (1, 1, "a", "low"),
        (7, 3, "ccc", "high"),  # another label: another row
        (1, 2, "bb", "high"),
    ]


def test_each_old_identity_is_given_once(tmp_path: Path) -> None:
    old = write(tmp_path, [(1, 1, "a", "low")])
    new = write(tmp_path, [(2, 1, "a", "low"), (2, 2, "a", "low")])
    name = keep_identities(old, new, tmp_path)
    assert name is not None
    kept = pd.read_parquet(tmp_path / name)
    assert list(zip(kept["object"], kept["row"], strict=True)) == [(1, 1), (2, 2)]
