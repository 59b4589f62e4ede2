"""DVC's files, against hashes that DVC itself wrote."""

import hashlib
from pathlib import Path

import pytest

from retune.dvc_files import EMPTY_DATA, EMPTY_DIR, lay, listing, md5_of, outs, path_md5, relative, safe, sections
from retune.errors import IntegrityError
from retune.records import Lineage

ROOT = Path(__file__).parents[2]


def test_files_and_folders_hash_as_dvc_hashes_them() -> None:
    """The committed dvc.lock was written by DVC on these very files."""
    section = sections((ROOT / "dvc.lock").read_text("utf-8"))["preprocess@ticket_priority"]
    code = {dep["path"]: dep["md5"] for dep in section["deps"] if dep["path"].startswith("src/")}
    assert any(md5.endswith(".dir") for md5 in code.values())
    assert {path: path_md5(ROOT / path) for path in code} == code


def test_compiled_files_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    before = path_md5(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/a.pyc").write_text("compiled")
    assert path_md5(tmp_path) == before
    with pytest.raises(IntegrityError, match="does not exist"):
        path_md5(tmp_path / "absent")


def test_a_listing_is_sorted_json() -> None:
    assert listing({"b": "1", "a/c": "2"}) == b'[{"md5": "2", "relpath": "a/c"}, {"md5": "1", "relpath": "b"}]'
    assert md5_of(listing({})) + ".dir" == EMPTY_DIR
    assert md5_of(b"abc") == hashlib.md5(b"abc", usedforsecurity=False).hexdigest()


def test_a_section_takes_the_place_of_the_one_before() -> None:
    lineage = Lineage(EMPTY_DATA, "", {}, "", False, "")
    lineage = lay(lay(lay(lineage, "a@p", {"outs": [{"path": "x"}]}), "b@p", {}), "a@p", {"outs": [{"path": "y"}]})
    assert list(sections(lineage.lock)) == ["a@p", "b@p"]
    assert [out["path"] for out in outs(lineage)] == ["data", "y"]


def test_paths_stay_inside() -> None:
    assert relative("data/p/a", "data") == "p/a"
    assert relative("data", "data") == ""
    assert relative("database", "data") is None
    for name in ("../x", "/x", ""):
        with pytest.raises(IntegrityError, match="stay inside"):
            safe(name)
