"""Near-duplicates in blocks: whatever the blocks' size and however many words there are, the same pairs."""

import random
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retune.data import duplicates
from retune.data.duplicates import jaccard, near_pairs, shingles


def texts(seed: int, count: int) -> list[str]:
    """Few words, so that many are near; some texts are short, some twice there, some without a word."""
    generator = random.Random(seed)
    return [" ".join(generator.choices("abcdefg", k=generator.randint(1, 9))) if generator.random() > 0.05 else "?!" for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_blocks_of_any_size_give_the_pairs_of_the_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    landed = texts(seed, 60)
    expected = {
        (later, earlier)
        for earlier, later in combinations(range(len(landed)), 2)
        if jaccard(shingles(landed[earlier]), shingles(landed[later])) >= 0.6
    }
    assert expected
    for block, candidates, slots in ((1, 1, 1), (7, 13, 4), (20_000, 1_000_000, 24)):
        monkeypatch.setattr(duplicates, "_TEXTS", block)
        monkeypatch.setattr(duplicates, "_HASHED", block)
        monkeypatch.setattr(duplicates, "_SLOTS", slots)
        monkeypatch.setattr(duplicates, "_CANDIDATES", candidates)
        chunks = list(near_pairs(iter(landed), 0.6))
        found = [pair for later, earlier in chunks for pair in zip(later.tolist(), earlier.tolist(), strict=True)]
        assert found == sorted(expected)
        # A text's pairs stand in one chunk.
        assert sum(len(set(later.tolist())) for later, _ in chunks) == len({later for later, _ in expected})


def test_what_a_text_repeats_counts_once() -> None:
    sizes, whole = duplicates._sets(["a", "a a", "a b c a b c", "a b c", "b c a b c", "d e f g"])
    assert sizes.tolist() == [1, 1, 3, 1, 3, 2]
    assert np.diff(whole.indptr).tolist() == [1, 1, 3, 1, 3, 0]
    assert [(later.tolist(), earlier.tolist()) for later, earlier in near_pairs(["a", "a a", "b"], 1.0)] == [([1], [0])]


@given(st.text(st.characters(codec="ascii")) | st.text())
def test_words_are_found_by_one_definition_however_they_are_looked_for(text: str) -> None:
    words = re.findall(r"\w+", text.casefold())
    assert duplicates._words_of(text) == (words or [text])


def test_a_long_text_near_to_every_part_of_many_others_takes_little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_CANDIDATES", 1_000)
    template = [f"w{place}" for place in range(300)]
    landed = [" ".join([*template, str(row)]) for row in range(40)]
    sizes = [len(later) for later, _ in duplicates._candidates(*_prefixes(landed))]
    assert max(sizes) <= 2_000
    assert sum(len(later) for later, _ in near_pairs(landed, 0.6)) == 40 * 39 // 2


def _prefixes(landed: list[str]) -> tuple[duplicates.Ints, np.ndarray]:
    """Every shared shingle of each text, as if all were of its prefix."""
    _, whole = duplicates._sets(landed)
    return np.repeat(np.arange(len(landed)), np.diff(whole.indptr)), whole.indices


def test_millions_of_words_do_not_run_out_of_numbers() -> None:
    counts = np.array([1, 2, 3, 6, 4, 3], dtype=np.int64)
    words = np.array([5, 5, 6, 1, 2, 3, 1, 2, 3, 1, 2, 4, 2, 3, 1, 2, 1, 2, 3], dtype=np.int32)
    of_few, few = duplicates._numbered(words, counts)
    of_many, many = duplicates._numbered(words + np.int32(2_000_000_000), counts)
    assert of_few.tolist() == of_many.tolist() == [0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 5]
    assert (few[:, None] == few).tolist() == (many[:, None] == many).tolist()
    # 1 2 3 three times, 2 3 1 and 3 1 2 twice; a word of a short text is no part of a longer one.
    assert few[3] == few[4] == few[10]
    assert few[5] == few[8]
    assert few[6] == few[9]
    assert len(set(few.tolist())) == 6
