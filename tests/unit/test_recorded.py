"""Releases found in ledgers."""

from pathlib import Path
from typing import Any

import pytest

from retune.errors import BadInputError, IntegrityError
from retune.ledger import Ledger
from retune.recorded import champion, find, named
from retune.records import Lineage
from retune.store import Store, open_store


def lineage(revision: int) -> dict[str, Any]:
    return Lineage("data", "lock", {}, "commit", False, "environment", revision).to_json()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Prompt p: the template 0a, release 0b promoted, release c held, then back to 0a; prompt q is empty."""
    store = open_store(tmp_path)
    ledger = Ledger(store, "p")
    template, tuned = {"release": "0a"}, {"release": "0b"}
    entry = ledger.append("found", "t", "alone", {"champion": template, "lineage": lineage(0)}, None)
    entry = ledger.append("promote", "t", "better", {"champion": tuned, "candidate": tuned, "lineage": lineage(1)}, entry)
    entry = ledger.append("hold", "t", "no gain", {"champion": tuned, "candidate": {"release": "c"}, "lineage": lineage(2)}, entry)
    ledger.append("rollback", "t", "worse in use", {"champion": template}, entry)
    return store


def test_the_champion_comes_with_the_lineage_of_the_entry_that_had_it(store: Store) -> None:
    found = champion(store, "p")
    assert found is not None
    assert (found.release, found.entry, found.lineage.revision) == ("0a", 0, 0)
    assert champion(store, "q") is None


def test_a_release_is_found_by_the_beginning_of_its_id(store: Store) -> None:
    assert (find(store, ["p", "q"], "c").lineage.revision, find(store, ["q", "p"], "0b").entry) == (2, 1)
    with pytest.raises(BadInputError, match="'0' begins 2 releases of p: 0a, 0b"):
        find(store, ["p"], "0")
    with pytest.raises(BadInputError, match="'d' begins 0 releases of p, q"):
        find(store, ["p", "q"], "d")


def test_a_champion_without_lineage_is_an_error(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    Ledger(store, "p").append("found", "t", "alone", {"champion": {"release": "a"}}, None)
    with pytest.raises(IntegrityError, match="champion a"):
        champion(store, "p")


def test_a_release_is_named_by_version_as_the_previous_one_or_by_its_id(tmp_path: Path) -> None:
    """Release 2f has version 1: an exact version comes before the beginning of an id."""
    store = open_store(tmp_path)
    ledger = Ledger(store, "p")
    template, tuned = {"release": "2f", "version": "1"}, {"release": "1e", "version": "2"}
    head = ledger.append("found", "t", "alone", {"champion": template, "lineage": lineage(0)}, None)
    with pytest.raises(BadInputError, match="p has had one champion only, or none"):
        named(store, "p", "previous")
    head = ledger.append("promote", "t", "better", {"champion": tuned, "candidate": tuned, "lineage": lineage(1)}, head)
    held = {"release": "3d", "version": None}
    ledger.append("hold", "t", "no gain", {"champion": tuned, "candidate": held, "lineage": lineage(2)}, head)
    names = {"previous": "2f", "1": "2f", "2": "1e", "2f": "2f", "3": "3d", None: "1e"}
    assert {name: named(store, "p", name).release for name in names} == names
    with pytest.raises(BadInputError, match="'None' begins 0 releases of p"):
        named(store, "p", "None")
