"""Noisy copies of training rows: typing errors, case and spacing, as people write. The same row and seed give the same copy."""

import hashlib
import random
import re
from collections.abc import Callable, Sequence

import pandas as pd

from retune.text import clean

__all__ = ["augment", "noisy"]

_PLACEHOLDER = re.compile(r"(<(?:mail|phone|card)>)")
_TRIES = 5


def augment(train: pd.DataFrame, inputs: Sequence[str], copies: int, seed: int) -> pd.DataFrame:
    """The rows, then `copies` noisy copies of each: id `ROW#1`, `ROW#2`, the same group. A copy equal to its row is left out."""
    pieces = [train]
    for copy in range(1, copies + 1):
        noised = train.copy()
        noised["id"] = [f"{row}#{copy}" for row in train["id"]]
        for field in inputs:
            pairs = zip(noised["id"], train[field], strict=True)
            noised[field] = pd.Series([noisy(text, f"{seed}:{row}:{field}") for row, text in pairs], index=train.index, dtype="str")
        pieces.append(noised[(noised[list(inputs)] != train[list(inputs)]).any(axis=1)])
    return pd.concat(pieces, ignore_index=True)


def noisy(text: str, seed: str) -> str:
    """One change of the text, or of two where it is long; clean stays clean, and what was redacted stays whole."""
    generator = random.Random(int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big"))
    for _ in range(_TRIES):
        changed = text
        for _ in range(1 + (len(text) > 60)):
            parts = _PLACEHOLDER.split(changed)
            place = generator.choice(range(0, len(parts), 2))
            parts[place] = generator.choice(_NOISES)(parts[place], generator)
            changed = "".join(parts)
        changed = clean(changed)
        if changed and changed != text:
            return changed
    return text


def _swap(text: str, generator: random.Random) -> str:
    places = [place for place in range(len(text) - 1) if text[place].isalpha() and text[place + 1].isalpha()]
    if not places:
        return text
    place = generator.choice(places)
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def _drop(text: str, generator: random.Random) -> str:
    return _at_letter(text, generator, lambda _: "")


def _double(text: str, generator: random.Random) -> str:
    return _at_letter(text, generator, lambda letter: letter * 2)


def _at_letter(text: str, generator: random.Random, change: Callable[[str], str]) -> str:
    places = [place for place, letter in enumerate(text) if letter.isalpha()]
    if len(places) < 2:
        return text
    place = generator.choice(places)
    return text[:place] + change(text[place]) + text[place + 1 :]


def _case(text: str, generator: random.Random) -> str:
    return generator.choice((str.lower, str.upper, str.capitalize, str.swapcase))(text)


def _join(text: str, generator: random.Random) -> str:
    places = [place for place in range(1, len(text) - 1) if text[place] == " "]
    if not places:
        return text
    place = generator.choice(places)
    return text[:place] + text[place + 1 :]


def _part(text: str, generator: random.Random) -> str:
    places = [place for place in range(1, len(text)) if text[place - 1].isalpha() and text[place].isalpha()]
    if not places:
        return text
    place = generator.choice(places)
    return f"{text[:place]} {text[place:]}"


_NOISES: tuple[Callable[[str, random.Random], str], ...] = (_swap, _drop, _double, _case, _join, _part)
