"""The pure half of `retune checkout`: what is laid, what is refused, and patches that git takes."""

import subprocess
from pathlib import Path

import pytest

from retune.checkout import laid, patch_text, uncommitted
from retune.dvc_files import lock_text, sections
from retune.records import Lineage


def git(folder: Path, *arguments: str, text: str | None = None) -> str:
    identity = ["-c", "user.name=Retune tests", "-c", "user.email=tests@localhost"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, input=text, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "data.dvc").write_text("one\ntwo\nthree\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("one\ntwo\nthree\n", "one\n2\nthree\n"),
        ("one\ntwo\nthree\n", "one\ntwo"),
        ("no line feed", "still none"),
        ("", "now some\n"),
        ("form\x0cfeed and \u2028 are no line ends\n", "form\x0cfeed and \u2028 are none\n"),
        ("dos\r\n", "dos\r\nmore\r\n"),
        ("\n".join(map(str, range(100))), "\n".join(str(n) for n in range(100) if n not in (3, 50, 97))),
        (None, "a new file\n"),
        (None, "without a line feed"),
    ],
)
def test_git_takes_every_patch(repository: Path, old: str | None, new: str) -> None:
    place = repository / "folder/dvc.lock"
    if old is not None:
        place.parent.mkdir()
        place.write_bytes(old.encode())
        git(repository, "add", "-A")
        git(repository, "commit", "-qm", "second")
    patch = patch_text({"folder/dvc.lock": old, "data.dvc": "same\n"}, {"folder/dvc.lock": new, "data.dvc": "same\n"})
    subprocess.run(["git", "apply", "-"], cwd=repository, input=patch.encode(), check=True)
    assert place.read_bytes() == new.encode()


def test_a_patch_of_nothing_is_empty() -> None:
    assert patch_text({"data.dvc": "a\n"}, {"data.dvc": "a\n"}) == ""


def test_a_prompts_sections_give_way_and_those_of_others_stay_where_they_are() -> None:
    before = lock_text({"tune@p": {"cmd": "old"}, "tune@other": {"cmd": "kept"}, "evaluate@p": {"cmd": "gone"}})
    lineage = Lineage("data", lock_text({"preprocess@p": {"cmd": "new"}, "tune@p": {"cmd": "new"}}), {}, "", False, "")
    files = laid(before, lineage, "p", "name: p\n")
    assert files["data.dvc"] == "data"
    assert files["prompts/p.yaml"] == "name: p\n"
    assert list(sections(files["dvc.lock"]).items()) == [
        ("tune@p", {"cmd": "new"}),
        ("tune@other", {"cmd": "kept"}),
        ("preprocess@p", {"cmd": "new"}),
    ]


def test_only_changes_that_would_be_lost_are_in_the_way(repository: Path) -> None:
    files = {"data.dvc": "another\n", "dvc.lock": "new\n"}
    assert uncommitted(repository, files) == []
    (repository / "data.dvc").write_text("edited\n")
    (repository / "dvc.lock").write_text("untracked\n")
    assert uncommitted(repository, files) == ["data.dvc", "dvc.lock"]
    assert uncommitted(repository, {"data.dvc": "edited\n"}) == [], "what is there already is not lost"


def test_without_git_every_change_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "data.dvc").write_text("one\n")
    assert uncommitted(tmp_path, {"data.dvc": "two\n"}) == ["data.dvc"]
    assert uncommitted(tmp_path, {"data.dvc": "one\n"}) == []
