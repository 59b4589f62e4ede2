"""Redaction and normalisation: what goes, what stays, and that serving and preprocessing agree."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retune.text import _GRAPHEME_JOINER, _INVISIBLE, clean, normalise, redact

TRICKY = st.text(alphabet=st.sampled_from(list("a@.b &#;x64lt<>+-()/0123456789\n\t\u200b\u0301é€:,'")), max_size=60)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to john.doe+shop@mail.example.co.uk today", "write to <mail> today"),
        ("Jürgen: jürgen@exämple.de.", "Jürgen: <mail>."),
        ("john&#64;example.org", "<mail>"),
        ("jo\u200bhn@example.org", "<mail>"),
        ("call +1 (555) 123-4567", "call <phone>"),
        ("call +49 (0)30 1234567, thanks", "call <phone>, thanks"),
        ("+44 20 7946 0958.", "<phone>."),
        ("0044 20 7946 0958", "<phone>"),
        ("(555) 123-4567 or 555.123.4567", "<phone> or <phone>"),
        ("1-800-555-0199 x12", "<phone>"),
        ("it is 555-0134", "it is <phone>"),
        ("030 1234567 and (0171) 123-4567", "<phone> and <phone>"),
        ("06 12 34 56 78", "<phone>"),
        ("my phone number is 5551234567", "my phone number is <phone>"),
        ("(555)\n123-4567", "<phone>"),
        ("4111 1111 1111 1111", "<card>"),
        ("4111-1111-1111-1111, exp 12/26", "<card>, exp 12/26"),
        ("12/26 4111111111111111 123", "12/26 <card> 123"),
        ("378282246310005", "<card>"),
    ],
)
def test_personal_data_goes(text: str, redacted: str) -> None:
    assert clean(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "order 12345 and order 123456",
        "on 2024-05-06, 12.05.2024, 05/06/2024 10:30, 01 02 2024 or 2024-05-06T10:30:00",
        "for $1,299.00, 1 234 567 EUR, €0123.45 or 1.234.567,89",
        "from 192.168.100.200, 10.0.0.1 or 127.0.0.1:8080",
        "version 1.20.333, ticket ORD-0123-45678, code #0123456789",
        "open 08.00-17.00, 3-4 days, 100-200 users, +100 points, zip 12345-6789",
        "4111 1111 1111 1112 fails the Luhn check",
        "me @ home, user@localhost, @handle",
    ],
)
def test_what_is_no_personal_data_stays(text: str) -> None:
    assert redact(text) == (text, {"mail": 0, "phone": 0, "card": 0})


def test_redactions_are_counted_by_kind() -> None:
    text, counts = redact("a@b.org, c@d.org\n+1 555 123 4567 paid with 4111 1111 1111 1111")
    assert text == "<mail>, <mail>\n<phone> paid with <card>"
    assert counts == {"mail": 2, "phone": 1, "card": 1}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  two\r\n\r\nlines\tand\u00a0more ", "two lines and more"),
        ("Tom &amp;amp; Jerry &lt;3 &nbsp; &#39;x&#39;", "Tom & Jerry <3 'x'"),
        ("AT&T ?a=1&copy=2 &nosuch;", "AT&T ?a=1&copy=2 &nosuch;"),
        ("e\u0301t\u200be\u0301\ufeff", "été"),
        ("a\x00b\x1fc\x85d", "ab c d"),
        ("\ud800x", "x"),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


@given(st.text(max_size=40) | TRICKY)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert normalise(once) == once


@given(st.text(max_size=40) | TRICKY)
def test_redacted_and_raw_text_clean_to_the_same(text: str) -> None:
    """Training sees what ingest redacted, serving what the caller sent."""
    redacted, _ = redact(text)
    assert redact(redacted) == (redacted, {"mail": 0, "phone": 0, "card": 0})
    assert clean(redacted) == clean(text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["a", "1", "1 ", "a@", "a.'", "0 1", "+1 ", "&", "(555) ", "555-123-", "phone 1 "])
def test_long_runs_are_redacted_in_linear_time(piece: str) -> None:
    clean(piece * (20_000 // len(piece)))


def _nested(levels: int) -> str:
    """An entity that is one only after that many rounds: each is closed by one that vanishes."""
    text = "&"
    for _ in range(levels):
        text = f"&am{text}#8203;p;"
    return text


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("&" + "amp;" * 100_000 + "lt;", "<"),
        ("&" + "amp;#38;#x26;AMP;" * 20_000, "&"),
        ("a" + "\u0301\u0316" * 100_000, None),
        (_nested(5_000), None),
    ],
)
def test_text_made_to_take_for_ever_is_cleaned_in_a_moment(text: str, expected: str | None) -> None:
    found = normalise(text)
    assert expected in (None, found)
    assert normalise(found) == found


@pytest.mark.parametrize("before", ["", "e", "中"])
def test_a_letter_has_at_most_30_marks(before: str) -> None:
    marks = "\u0316\u0301" * 16
    for count in (29, 30, 31, 32):
        assert normalise(before + marks[:count] + " x") == unicodedata.normalize("NFC", before + marks[: min(count, 30)] + " x")


def test_what_is_invisible_is_not_printable_but_for_one() -> None:
    """`_reveal` takes a printable text as having nothing invisible in it."""
    characters = map(chr, range(0x110000))
    assert [one for one in characters if one.isprintable() and _INVISIBLE.match(one)] == [_GRAPHEME_JOINER]
