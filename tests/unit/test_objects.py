"""Objects of the remote and of a host's cache that are not what their names say."""

import hashlib
from pathlib import Path

import pytest

from retune.errors import IntegrityError
from retune.objects import Objects
from retune.store import FolderStore

CONTENT = b"some rows\n" * 100
MD5 = hashlib.md5(CONTENT).hexdigest()


def place(folder: Path) -> Path:
    return folder / "files/md5" / MD5[:2] / MD5[2:]


def hold(folder: Path, content: bytes) -> Path:
    """The object in a cache or remote, read-only, as DVC leaves it."""
    path = place(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o444)
    return path


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(FolderStore(tmp_path / "store"), tmp_path / "cache")


def test_a_damaged_copy_of_the_cache_is_not_read_and_can_be_dropped(objects: Objects, tmp_path: Path) -> None:
    hold(tmp_path / "store/dvc", CONTENT)
    damaged = hold(tmp_path / "cache", CONTENT[:500])
    assert objects.get(MD5) == CONTENT
    assert objects.drop_damaged([MD5]) == [MD5]
    assert not damaged.exists()
    assert objects.drop_damaged([MD5]) == [], "nothing there"
    kept = hold(tmp_path / "cache", CONTENT)
    assert objects.drop_damaged([MD5, "0" * 32]) == []
    assert kept.read_bytes() == CONTENT


def test_a_damaged_object_of_the_store_is_named(objects: Objects, tmp_path: Path) -> None:
    hold(tmp_path / "store/dvc", CONTENT[:500])
    with pytest.raises(IntegrityError, match=rf"{MD5[2:]} in the store .* restore it from a backup"):
        objects.get(MD5)
    with pytest.raises(IntegrityError, match="was pushed but reads back as"):
        objects.verify(MD5)


def test_what_a_stage_made_again_takes_the_place_of_a_damaged_object(objects: Objects, tmp_path: Path) -> None:
    hold(tmp_path / "store/dvc", CONTENT[:500])
    hold(tmp_path / "cache", CONTENT)
    objects.verify(MD5)
    assert place(tmp_path / "store/dvc").read_bytes() == CONTENT


def test_an_answer_that_was_cut_on_its_way_is_read_again(tmp_path: Path) -> None:
    hold(tmp_path / "store/dvc", CONTENT)
    cut = [True, True]

    class Cutting(FolderStore):
        def get(self, key: str) -> bytes:
            return super().get(key)[: 500 if cut and cut.pop() else None]

        def md5(self, key: str) -> str:
            return hashlib.md5(self.get(key)).hexdigest()

    objects = Objects(Cutting(tmp_path / "store"), tmp_path / "cache")
    cut[:] = [True]
    assert objects.get(MD5) == CONTENT
    cut[:] = [True]
    objects.verify(MD5)
    assert cut == []
