"""Personal data out, one spelling of white space: what every text goes through, at preprocessing and at serving alike.

`clean` is that one way, and `clean(clean(x)) == clean(x)`. `redact` leaves ordinary text as it stands (line breaks, entities) and is what
ingest applies before anything is versioned; `clean(redact(x)) == clean(x)`.

A cleaned text is one line: so several references of one input stand in one cell, one to a line.
"""

import html
import re
import unicodedata
from collections.abc import Iterable
from html.entities import html5

__all__ = ["CARD", "MAIL", "PHONE", "clean", "join_references", "normalise", "redact", "split_references"]

MAIL = "<mail>"
PHONE = "<phone>"
CARD = "<card>"

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_AMPERSANDS = re.compile(r"&(?:(?:amp|AMP|#0{0,5}38|#[xX]0{0,4}26);)+")
"""An ampersand that was escaped any number of times, each time anew."""
_ROUNDS = 50
"""Entities within entities that are unescaped; nobody writes as many, but a file made to take for ever."""
_COMBINING = "".join(chr(code) for code in range(0x300, 0x1E950) if unicodedata.combining(chr(code)))
_MARKS = re.compile(f"([{_COMBINING}]{{30}})[{_COMBINING}]+")
"""More marks on one letter than any language has (the limit is that of UAX #15): their order is found in quadratic time."""
_FAR = re.compile("[\u0300-\U0010ffff][\u0300-\U0010ffff]{30}")
"""What holds so many marks holds this, which is found in a fraction of the time."""
# Control characters, soft hyphen, zero-width and direction marks, lone surrogates, tag characters.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)

_GRAPHEME_JOINER = "\u034f"
"""The only one of them that Python calls printable: a look at that costs a fraction of a search."""

# Bounded repetition keeps each pattern linear on long runs of one character.
_MAIL = re.compile(r"\w[\w.+%'’-]{0,63}@(?:[\w-]{1,63}\.){1,8}(?:xn--[\w-]{1,59}|[^\W\d_]{2,24})")
_DIGIT_GROUPS = re.compile(r"(?<!\d)(?:\d{2,19}(?!\d)[ \u00a0.-]?){1,200}")
_DIGITS = re.compile(r"\d+")
_CARD_LENGTHS = (16, 15, 14, 13, 19, 18, 17)
_PHONE_DIGITS = 7
"""At least, of a phone number."""

_LEFT = r"(?<![\w#$€£¥+])(?<!\w-)(?<!\d[./,:])"
_RIGHT = r"(?!\w)(?![-./,:]\d)"
_EXTENSION = r"(?:\s?(?:x|ext\.?)\s?\d{1,5})?"
_GAP = r"[ \u00a0.()/-]{0,3}"
_PHONES = tuple(
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        # International: +1 (555) 123-4567, +49 (0)30 1234567, 0044 20 7946 0958
        ("+", rf"(?<!\w)\(?\+\(?1(?:{_GAP}\d){{10}}(?!\d){_EXTENSION}"),
        ("+", rf"(?<!\w)\(?\+\(?[1-9](?:{_GAP}\d){{6,14}}(?!\d)"),
        ("00", rf"{_LEFT}00[1-9](?:{_GAP}\d){{7,14}}{_RIGHT}"),
        # North American: (555) 123-4567, 555.123.4567, 1-800-555-0199
        ("", rf"{_LEFT}(?:1[-. ])?(?:\(\d{{3}}\)[-. ]?|\d{{3}}[-. ])\d{{3}}[-. ]\d{{4}}{_EXTENSION}{_RIGHT}"),
        ("-", rf"{_LEFT}[2-9]\d{{2}}-\d{{4}}{_RIGHT}"),
        # With a trunk zero: 030 1234567, (0171) 123-4567, 06 12 34 56 78, 01711234567
        ("0", rf"{_LEFT}\(?0[1-9]\d{{0,4}}\)?(?:[ \u00a0./-]{{1,3}}\d{{2,8}}){{1,5}}{_RIGHT}"),
        ("0", rf"{_LEFT}0[1-9]\d{{8,10}}{_RIGHT}"),
    )
)
"""Each beside what every text holds that it finds something in."""
# Any seven digits or more that the words before them call a phone number.
_CALLED = re.compile(
    r"(\b(?:tele)?phone|\btel|\bmobile|\bcell|\bfax|\bwhatsapp|\bcall|\bring|\breach)"
    r"((?:[\s.:]{1,3}(?:no|number|is|me|us|at|on|under)\b){0,4}[\s.:]{1,3})\d(?:[ .-]?\d){6,14}(?!\w)",
    re.IGNORECASE,
)
_DATE_OR_TIME = re.compile(
    r"(?<!\d)(?:(?:0?[1-9]|[12]\d|3[01])([./ -])(?:0?[1-9]|[12]\d|3[01])\1(?:19|20)\d\d|\d{1,2}[.]\d\d ?- ?\d{1,2}[.]\d\d)(?!\d)"
)
_DOTTED_QUAD = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")


def normalise(text: str) -> str:
    """NFC, entities unescaped, control and zero-width characters removed, white space runs to one space, stripped. Idempotent."""
    while True:
        revealed = _reveal(text)
        spaced = " ".join(revealed.split())
        if revealed == text:  # only white space changed, if anything: nothing new can come to light
            return spaced
        text = spaced


def redact(text: str) -> tuple[str, dict[str, int]]:
    """The text with personal data replaced by `<mail>`, `<phone>` and `<card>`, and how many of each. Idempotent.

    Entities and invisible characters go too, since they hide such data (`john&#64;example.org`); white space stays, unless data only
    appear across a line break: then the text comes back normalised.
    """
    counts = {"mail": 0, "phone": 0, "card": 0}
    while True:
        text = _reveal(text)
        if not _may_hold(text):
            return text, counts
        text = _redact_visible(text, counts)
        plain = normalise(text)
        if plain == text:
            return text, counts
        redacted = _redact_visible(plain, counts)
        if redacted == plain:
            return text, counts
        text = redacted


def clean(text: str) -> str:
    """The text as the model sees it: redacted, then normalised. Idempotent."""
    return normalise(redact(text)[0])


def join_references(texts: Iterable[str]) -> str:
    """Cleaned texts as one cell, one to a line."""
    return "\n".join(texts)


def split_references(cell: str) -> list[str]:
    """The texts of a cell that `join_references` made."""
    return cell.split("\n")


def _reveal(text: str) -> str:
    """NFC without entities, control and zero-width characters; white space as it stands."""
    for _ in range(_ROUNDS):
        before = text
        if "&" in text:
            text = _ENTITY.sub(_unescape, _AMPERSANDS.sub("&", text))
        if not text.isprintable() or _GRAPHEME_JOINER in text:
            text = _INVISIBLE.sub("", text)
        text = _composed(text)
        if text == before:
            return text
    return _composed(_ENTITY.sub(" ", text))


def _composed(text: str) -> str:
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", _MARKS.sub(r"\1", text) if _FAR.search(text) else text)


def _unescape(match: re.Match[str]) -> str:
    entity = match[0]
    return html.unescape(entity) if entity[1] == "#" else html5.get(entity[1:], entity)


def _may_hold(text: str) -> bool:
    """Quickly: whether there is what every mail address, or every number, has."""
    return "@" in text or _digits(text) >= _PHONE_DIGITS


def _digits(text: str) -> int:
    if text.isascii():
        return len(text) - len(text.encode().translate(None, b"0123456789"))
    return sum(map(len, _DIGITS.findall(text)))


def _redact_visible(text: str, counts: dict[str, int]) -> str:
    # Until nothing is found: a replacement can uncover the boundary that its neighbour lacked.
    while _may_hold(text):
        before = text
        if "@" in text:
            text, found = _MAIL.subn(MAIL, text)
            counts["mail"] += found
        if (digits := _digits(text)) >= _PHONE_DIGITS:
            if digits >= min(_CARD_LENGTHS):
                text = _DIGIT_GROUPS.sub(lambda match: _redact_cards(match[0], counts), text)
            for part, pattern in _PHONES:
                if part in text:
                    text = pattern.sub(lambda match: _redact_phone(match[0], counts), text)
            text, found = _CALLED.subn(rf"\1\2{PHONE}", text)
            counts["phone"] += found
        if text == before:
            break
    return text


def _redact_phone(found: str, counts: dict[str, int]) -> str:
    digits = sum(character.isdigit() for character in found)
    number = found.lstrip("(")
    if number.startswith("0") and not 9 <= digits <= 17:
        return found
    if number.startswith("00") and number.isdigit() and digits < 11:
        return found
    if not number.startswith("+") and (_DATE_OR_TIME.search(found) or _DOTTED_QUAD.fullmatch(found)):
        return found
    counts["phone"] += 1
    return PHONE


def _redact_cards(run: str, counts: dict[str, int]) -> str:
    """Replaces the whole groups of digits that together make a card number: 13 to 19 digits, Luhn-valid; 16 and 15 are tried first."""
    groups = list(_DIGITS.finditer(run))
    spans = []
    for first in range(len(groups)):
        digits = ""
        for last in range(first, len(groups)):
            digits += groups[last][0]
            if len(digits) > 19:
                break
            if len(digits) >= 13 and _luhn(digits):
                spans.append((_CARD_LENGTHS.index(len(digits)), groups[first].start(), groups[last].end()))
    taken: list[tuple[int, int]] = []
    for _, start, end in sorted(spans):
        if all(end <= other_start or start >= other_end for other_start, other_end in taken):
            taken.append((start, end))
    counts["card"] += len(taken)
    for start, end in sorted(taken, reverse=True):
        run = run[:start] + CARD + run[end:]
    return run


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0
