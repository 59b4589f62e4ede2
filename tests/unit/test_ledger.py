"""Ledgers on a folder store: the chain, its damage, races, and what a prompt's entries add up to."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retune.errors import ConfigError, ConflictError, IntegrityError
from retune.ledger import Entry, Ledger, Standing, decided, standing
from retune.store import FolderStore

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3),
    max_leaves=8,
)


def filled(folder: Path, length: int, name: str = "support") -> Ledger:
    ledger = Ledger(FolderStore(folder), name)
    head = None
    for n in range(length):
        head = ledger.append("promote", "test", f"entry {n}", {"champion": {"release": f"r{n}", "version": n}}, head)
    return ledger


def path(folder: Path, n: int, name: str = "support") -> Path:
    return folder / "ledger" / name / f"{n:08d}.json"


def test_an_empty_ledger_has_no_head(tmp_path: Path) -> None:
    ledger = Ledger(FolderStore(tmp_path), "support")
    assert (ledger.head(), ledger.entries(), ledger.verify()) == (None, [], 0)


def test_entries_are_canonical_json_chained_by_hash(tmp_path: Path) -> None:
    ledger = Ledger(FolderStore(tmp_path), "support")
    before = datetime.now(UTC)
    first = ledger.append("found", "me", "a reason, ünïcode", {"champion": {"release": "r0"}, "z": [1.5]}, None)
    second = ledger.append("hold", "you", "", {}, first)
    raw = path(tmp_path, 0).read_bytes()
    document = json.loads(raw)
    assert raw == json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert (document["n"], document["previous"], document["kind"], document["by"], document["reason"]) == (
        0,
        None,
        "found",
        "me",
        "a reason, ünïcode",
    )
    assert (document["champion"], document["z"]) == ({"release": "r0"}, [1.5])
    assert document["at"].endswith("Z")
    assert abs((datetime.fromisoformat(document["at"]) - before).total_seconds()) < 10
    assert first.sha256 == hashlib.sha256(raw).hexdigest()
    assert first.body == {"champion": {"release": "r0"}, "z": [1.5]}
    following = json.loads(path(tmp_path, 1).read_bytes())
    assert (following["n"], following["previous"], following["champion"]) == (1, first.sha256, None)
    assert ledger.entries() == [first, second]
    assert ledger.head() == second


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(bodies=st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), JSON, max_size=4), min_size=1, max_size=5))
def test_what_is_appended_is_read_back_in_order(tmp_path_factory: pytest.TempPathFactory, bodies: list[dict[str, Any]]) -> None:
    reserved = {"n", "previous", "at", "kind", "by", "reason", "attempt"}
    bodies = [{key: value for key, value in body.items() if key not in reserved} for body in bodies]
    ledger = Ledger(FolderStore(tmp_path_factory.mktemp("ledger")), "x")
    head = None
    appended = []
    for body in bodies:
        head = ledger.append("kind", "by", "reason", body, head)
        appended.append(head)
    assert ledger.entries() == appended
    assert [entry.body for entry in appended] == [{"champion": None} | body for body in bodies]
    assert ledger.head() == appended[-1]


def test_who_decided_on_an_old_head_loses(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 2)
    first, second = ledger.entries()
    for expected in (None, first):
        with pytest.raises(ConflictError, match="somebody else appended entry"):
            ledger.append("promote", "late", "", {}, expected)
    assert ledger.entries() == [first, second]
    assert ledger.append("promote", "in time", "", {}, second).n == 2


def test_a_head_that_the_store_does_not_hold_is_refused(tmp_path: Path) -> None:
    head = filled(tmp_path / "one", 3).head()
    for length in (1, 3):  # too short, and of the same length with other entries
        other = filled(tmp_path / str(length), length)
        with pytest.raises(IntegrityError, match="entry 2"):
            other.append("promote", "", "", {}, head)
        assert other.verify() == length


@pytest.mark.parametrize("body", [{"n": 1}, {"previous": None}, {"at": ""}, {"kind": ""}, {"attempt": ""}, {"x": float("nan")}])
def test_a_body_that_would_break_the_entry_is_refused(tmp_path: Path, body: dict[str, Any]) -> None:
    ledger = Ledger(FolderStore(tmp_path), "support")
    with pytest.raises(ValueError):
        ledger.append("promote", "", "", body, None)
    assert ledger.entries() == []


@pytest.mark.parametrize("name", ["", "/a", "a/", "A", "a b", "../a", "a//b", "_a", "a\n"])
def test_a_malformed_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="ledger's name"):
        Ledger(FolderStore(tmp_path), name)


def test_ledgers_of_one_store_are_apart(tmp_path: Path) -> None:
    one, nested = filled(tmp_path, 2, "prompts"), filled(tmp_path, 3, "prompts/support")
    assert (one.verify(), nested.verify()) == (2, 3)


def test_head_reads_no_more_than_two_entries(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 12)
    reads: list[str] = []

    class Counting(FolderStore):
        def get(self, key: str) -> bytes:
            reads.append(key)
            return super().get(key)

    assert Ledger(Counting(tmp_path), "support").head() == ledger.entries()[-1]
    assert len(reads) == 2


def test_head_is_found_though_the_listing_lags_behind(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 4)

    class Lagging(FolderStore):
        def list(self, prefix: str = "") -> list[str]:
            return super().list(prefix)[:-2]

    lagging = Ledger(Lagging(tmp_path), "support")
    assert lagging.head() == ledger.head()
    assert lagging.verify() == 4


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "removed": lambda raw: None,
    "emptied": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "one byte short": lambda raw: raw[:-1],
    "not an object": lambda raw: b"[]",
    "rewritten with spaces": lambda raw: json.dumps(json.loads(raw)).encode(),
    "without a field": lambda raw: raw.replace(b'"by":"test",', b""),
    "not UTF-8": lambda raw: raw.replace(b"test", b"\xff\xff"),
}


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_found_and_the_entry_named(tmp_path: Path, n: int, how: str) -> None:
    ledger = filled(tmp_path, 4)
    place = path(tmp_path, n)
    changed = DAMAGE[how](place.read_bytes())
    assert changed != place.read_bytes()
    if changed is None:
        place.unlink()
    else:
        place.write_bytes(changed)
    if (n, how) == (3, "removed"):  # cannot be told from a ledger that never had it
        assert ledger.verify() == 3
        return
    with pytest.raises(IntegrityError, match=f"entry {n} "):
        ledger.verify()
    if n >= 2:
        with pytest.raises(IntegrityError, match=f"entry {n} "):
            ledger.head()


def test_an_answer_that_was_cut_on_its_way_is_read_again(tmp_path: Path) -> None:
    entries = filled(tmp_path, 3).entries()
    cut = [path(tmp_path, 2).name]

    class Cutting(FolderStore):
        def get(self, key: str) -> bytes:
            whole = super().get(key)
            if Path(key).name in cut:
                cut.remove(Path(key).name)
                return whole[: len(whole) // 2]
            return whole

    assert Ledger(Cutting(tmp_path), "support").entries() == entries
    assert cut == []


def test_a_changed_value_is_found_by_the_entry_after_it(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    place = path(tmp_path, 1)
    place.write_bytes(place.read_bytes().replace(b'"release":"r1"', b'"release":"r9"'))
    with pytest.raises(IntegrityError, match=r"entry 1 .* was changed"):
        ledger.verify()
    with pytest.raises(IntegrityError, match=r"entry 1 .* was changed"):
        ledger.head()


def test_a_survey_brings_what_can_be_read_and_says_what_cannot(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 6)
    assert ledger.survey() == (ledger.entries(), {})
    path(tmp_path, 1).write_bytes(path(tmp_path, 1).read_bytes().replace(b'"release":"r1"', b'"release":"r9"'))
    path(tmp_path, 3).unlink()
    path(tmp_path, 5).write_bytes(b"{")
    entries, broken = ledger.survey()
    assert [entry.n for entry in entries] == [0, 1, 2, 4]
    assert [(n, words) for n, text in sorted(broken.items()) for words in ("was changed", "is missing", "is damaged") if words in text] == [
        (1, "was changed"),
        (3, "is missing"),
        (5, "is damaged"),
    ]
    with pytest.raises(IntegrityError, match=r"entry 1 .* was changed"):
        ledger.entries()


def test_an_entry_at_anothers_place_is_found(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    path(tmp_path, 3).write_bytes(path(tmp_path, 2).read_bytes())
    with pytest.raises(IntegrityError, match=r"entry 3 .* is not at its place"):
        ledger.verify()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_flipped_byte_before_the_last_entry_and_any_cut_is_found(tmp_path: Path, data: st.DataObject) -> None:
    ledger = filled(tmp_path, 4, "flipped") if not (tmp_path / "ledger").exists() else Ledger(FolderStore(tmp_path), "flipped")
    assert ledger.verify() == 4
    n = data.draw(st.integers(0, 3), label="entry")
    place = path(tmp_path, n, "flipped")
    raw = place.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1), label="byte")
    flip = data.draw(st.integers(1, 255), label="flip") if n < 3 else 0
    changed = raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :] if flip else raw[:at]
    try:
        place.write_bytes(changed)
        with pytest.raises(IntegrityError, match=f"entry {n} "):
            ledger.verify()
    finally:
        place.write_bytes(raw)


RACER = """
import sys, time
from pathlib import Path
from retune.errors import ConflictError
from retune.ledger import Ledger
from retune.store import open_store

address, rounds, me, start = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
ledger = Ledger(open_store(address), "raced")
ledger.head()
(start / me).touch()
while not (start / "go").exists():
    time.sleep(0.002)
for n in range(rounds):
    while ((head := ledger.head()) and head.n or 0) < n - 1 or (n and head is None):
        time.sleep(0.002)
    if head is not None and head.n >= n:
        print("late")
        continue
    time.sleep(0.03)
    try:
        ledger.append("promote", me, "", {}, head)
        print("won")
    except ConflictError:
        print("lost")
"""


def race(address: str, rounds: int, folder: Path, env: dict[str, str] | None = None) -> list[list[str]]:
    """Eight processes append to one ledger, round by round, each on the head that it saw. Returns what each says of each round."""
    folder.mkdir()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, address, str(rounds), f"p{i}", str(folder)], stdout=subprocess.PIPE, text=True, env=env
        )
        for i in range(8)
    ]
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    (folder / "go").touch()
    said = [racer.communicate(timeout=300)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 8
    return said


def test_of_eight_racing_processes_exactly_one_wins_each_round(tmp_path: Path) -> None:
    rounds = 25
    said = race(str(tmp_path / "store"), rounds, tmp_path / "start")
    entries = Ledger(FolderStore(tmp_path / "store"), "raced").entries()
    assert [entry.n for entry in entries] == list(range(rounds))
    for n in range(rounds):
        winners = [f"p{i}" for i in range(8) if said[i][n] == "won"]
        assert winners == [entries[n].by]
    assert sum(one.count("lost") for one in said) > 0  # they did meet


def entries_of(*steps: tuple[str, str | None] | tuple[str, str | None, dict[str, Any]]) -> list[Entry]:
    """Entries of (kind, champion's release, other fields of the body)."""
    entries = []
    for n, (kind, release, *rest) in enumerate(steps):
        champion = None if release is None else {"release": release, "version": n}
        body = {"champion": champion, **(rest[0] if rest else {})}
        entries.append(Entry(n, f"hash {n}", None, f"at {n}", kind, "me", "", body))
    return entries


def said(now: Standing) -> tuple[str | None, str | None, str | None, set[str], str | None]:
    names = [one and one["release"] for one in (now.champion, now.previous, now.fallback)]
    return (*names, set(now.barred), now.since)  # type: ignore[return-value]


F, P, Q = ("found", "A"), ("promote", "B"), ("promote", "C")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], (None, None, None, set(), None)),
        ([F], ("A", None, None, set(), "at 0")),
        ([F, P], ("B", "A", "A", set(), "at 1")),
        ([F, P, ("hold", "B"), ("reject", None)], ("B", "A", "A", set(), "at 1")),
        ([F, P, Q], ("C", "B", "B", set(), "at 2")),
        ([F, P, Q, ("rollback", "B")], ("B", "C", "A", {"C"}, "at 3")),
        ([F, P, Q, ("rollback", "B"), ("rollback", "A")], ("A", "B", None, {"B", "C"}, "at 4")),
        ([F, P, Q, ("rollback", "A")], ("A", "C", "B", {"C"}, "at 3")),
        ([F, P, ("rollback", "A"), ("unbar", None, {"release": "B"})], ("A", "B", "B", set(), "at 2")),
        ([F, P, ("rollback", "A"), ("unbar", "A", {"release": "B"}), P], ("B", "A", "A", set(), "at 4")),
        ([F, P, ("moved", "A")], ("A", "B", "B", set(), "at 2")),
        ([F, P, ("rollback", "B")], ("B", "A", "A", set(), "at 1")),
        ([F, ("unbar", None, {"release": "Z"})], ("A", None, None, set(), "at 0")),
    ],
)
def test_standing_after(steps: list[Any], expected: tuple[Any, ...]) -> None:
    assert said(standing(entries_of(*steps))) == expected


def test_the_champion_is_the_latest_record_of_its_release() -> None:
    now = standing(entries_of(F, ("promote", "B"), ("hold", "B")))
    assert now.champion == {"release": "B", "version": 2}


@given(
    st.lists(st.tuples(st.sampled_from(["promote", "hold", "rollback", "unbar", "moved"]), st.sampled_from([None, *"ABC"])), max_size=12)
)
def test_standing_agrees_with_a_naive_reading(steps: list[tuple[str, str | None]]) -> None:
    entries = entries_of(F, *((kind, release, {"release": "B"} if kind == "unbar" else {}) for kind, release in steps))
    champions = [entry.body["champion"] and entry.body["champion"]["release"] for entry in entries]
    now = standing(entries)
    seen = [release for release in champions if release]
    assert now.champion is not None
    assert now.champion["release"] == seen[-1]
    others = [release for release in seen if release != seen[-1]]
    assert (now.previous and now.previous["release"]) == (others[-1] if others else None)
    free = [release for release in others if release not in now.barred]
    assert (now.fallback and now.fallback["release"]) == (free[-1] if free else None)
    for release in "ABC":
        barred = False
        for n, entry in enumerate(entries):
            before = next((one for one in reversed(champions[:n]) if one), None)
            if entry.kind == "rollback" and champions[n] not in (None, release) and before == release:
                barred = True
            if entry.kind == "unbar" and release == "B":
                barred = False
        assert (release in now.barred) == barred


def test_decided_finds_the_latest_decision_with_the_fingerprint() -> None:
    entries = entries_of(
        F,
        ("hold", None, {"fingerprint": "x"}),
        ("promote", "B", {"fingerprint": "x"}),
        ("reject", None, {"fingerprint": "y"}),
        ("rollback", "A", {"fingerprint": "x"}),
        ("hold", None),
    )
    assert decided(entries, "x") == entries[2]
    assert decided(entries, "y") == entries[3]
    assert decided(entries, "z") is None
    assert decided([], "x") is None
