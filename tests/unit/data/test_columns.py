"""A column done at once is its texts done one by one: the definition is `retune.text`, and no shortcut may show."""

import unicodedata
from collections import Counter

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.data import columns
from retune.data.parts import BETWEEN_INPUTS, split_bucket, split_buckets
from retune.text import clean, normalise, redact

# What is told apart: white space of all kinds, invisible and composing characters, entities, and what makes mail addresses and numbers.
TELLING = st.text(
    alphabet=st.sampled_from(
        list("ab@.& #;amp\t\n\r\x0b\x1c\x1f\x85\u00a0\u00ad\u2003\u2028\u200b\u0301\u0327é一ーがカ゛한ᆨ€’–+-()/0123456789<>")
    ),
    max_size=40,
)
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.sampled_from(
    ["call +1 (555) 123-4567", "0171 1234567", "4111 1111 1111 1111", "a@b.org", "on 2024-05-06", "123456", "1234567"]
)
TEXTS = st.lists(st.none() | TELLING | ANY | NUMBERS | st.builds(lambda a, b: f"{a} {b}", NUMBERS, TELLING), max_size=12)


def column(texts: list[str | None]) -> "pd.Series[str]":
    return pd.Series(texts, dtype="str", index=range(5, 5 + len(texts)), name="text")


def plain(values: "pd.Series[str]") -> list[str | None]:
    return [None if pd.isna(value) else value for value in values]


@given(TEXTS)
@settings(deadline=None, max_examples=150)
def test_a_column_is_normalised_cleaned_and_redacted_as_its_texts_are(texts: list[str | None]) -> None:
    values = column(texts)
    assert columns.normalised(columns.arrow(values)).to_pylist() == [text if text is None else normalise(text) for text in texts]
    assert plain(columns.cleaned(values)) == [text if text is None else clean(text) for text in texts]
    redacted, counts = columns.redacted(values)
    expected = [(None, {}) if text is None else redact(text) for text in texts]
    assert plain(redacted) == [text for text, _ in expected]
    assert Counter(counts) == sum((Counter(found) for _, found in expected), Counter())
    assert redacted.index.equals(values.index)


def test_each_character_that_is_called_plain_is_left_as_it_stands_in_any_company() -> None:
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    seen = columns.arrow(column(every))
    called_plain = [c for c, yes in zip(every, columns.pc.match_substring_regex(seen, columns._NORMAL).to_pylist(), strict=True) if yes]
    assert len(called_plain) > 30_000
    assert all(normalise(c) == c for c in called_plain)
    # Composition takes a character that may follow another one; none of these does, nor does a text of them hold white space or entities.
    followers = {chr(int(code, 16)) for c in every for code in unicodedata.decomposition(c).split()[1:] if not code.startswith("<")}
    composing = {c for c in followers if unicodedata.combining(c) or not unicodedata.is_normalized("NFC", "a" + c)}
    assert not composing & set(called_plain)
    assert "".join(called_plain) == unicodedata.normalize("NFC", "".join(called_plain))
    assert not any(c.isdigit() and c not in "0123456789" and unicodedata.category(c) == "Nd" for c in called_plain)


@given(st.lists(st.tuples(ANY, TELLING), max_size=8))
def test_buckets_of_many_rows_are_those_of_each(rows: list[tuple[str, str]]) -> None:
    first, second = column([one for one, _ in rows]), column([other for _, other in rows])
    assert split_buckets(columns.joined([columns.arrow(first), columns.arrow(second)], BETWEEN_INPUTS)).tolist() == [
        split_bucket(row) for row in rows
    ]
    assert split_buckets(columns.joined([columns.arrow(first)], BETWEEN_INPUTS)).tolist() == [split_bucket([one]) for one, _ in rows]


def test_texts_come_one_by_one_whatever_their_number() -> None:
    texts = [f"text {number}" for number in range(25_001)]
    assert list(columns.texts_of(column(texts))) == texts
