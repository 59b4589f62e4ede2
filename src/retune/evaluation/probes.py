"""Probes: test rows put in other words, whose answers should stay what they are. The same rows and settings give the same probes.

Perturbations are those of CheckList's invariance tests (Ribeiro et al., ACL 2020, arXiv:2005.04118), swaps its counterfactual pairs.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pandas as pd

from retune.config import Prompt
from retune.policy import Perturbation
from retune.text import clean

__all__ = ["Probe", "probes_of", "swap_words"]

Probe = tuple[str, str | None, pd.DataFrame]
"""Name, the template to use where it is not the release's, and rows: those of the test split with changed texts, `of` holding the id of the
row as it was. A row that a probe leaves unchanged is not in it."""
Change = Callable[[str, str], str]
"""Text and id of its row -> text."""
WORD = re.compile(r"\w+")


def probes_of(test: pd.DataFrame, prompt: Prompt) -> Iterator[Probe]:
    """The probes that the prompt file asks for, on rows drawn by its seed, the same ones for each; none that would be empty."""
    settings = prompt.evaluate.probes
    rows = test.sample(min(settings.rows, len(test)), random_state=settings.seed).sort_index()
    rows = rows.assign(of=rows["id"])
    changes: list[tuple[str, Sequence[str], Change]] = []
    changes += [(kind, prompt.inputs, partial(_perturbed, kind, settings.seed)) for kind in settings.perturbations]
    changes += [("swaps", prompt.inputs, partial(_swapped, pair)) for pair in settings.swaps]
    changes += [("injections", prompt.inputs[-1:], partial(_injected, text)) for text in settings.injections]
    for number, (name, fields, change) in enumerate(changes):
        changed = rows.assign(id=[f"{row}~{name}{number}" for row in rows["of"]])
        for field in fields:
            pairs = zip(rows[field], rows["of"], strict=True)
            changed[field] = pd.Series([clean(change(text, row)) or text for text, row in pairs], index=rows.index, dtype="str")
        changed = changed[(changed[list(fields)] != rows[list(fields)]).any(axis=1)]
        if len(changed):
            yield name, None, changed
    for number, template in enumerate(settings.templates):
        yield "templates", template, rows.assign(id=[f"{row}~template{number}" for row in rows["of"]])


def _perturbed(kind: Perturbation, seed: int, text: str, row: str) -> str:
    return _PERTURBATIONS[kind](text, _generator(seed, kind, row))


def _swapped(pair: tuple[str, str], text: str, _: str) -> str:
    return swap_words(text, *pair)


def _injected(injected: str, text: str, _: str) -> str:
    return f"{text} {injected}"


def _generator(*of: object) -> random.Random:
    digest = hashlib.blake2b("\0".join(map(str, of)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _typos(text: str, generator: random.Random) -> str:
    """One word in ten, one at least, with two neighbouring letters swapped or one left out."""
    words = [match for match in WORD.finditer(text) if len(match[0]) > 3]
    for match in sorted(generator.sample(words, min(len(words), 1 + len(words) // 10)), key=lambda match: -match.start()):
        place = match.start() + generator.randrange(1, len(match[0]) - 1)
        middle = text[place + 1] + text[place] if generator.random() < 0.5 else text[place + 1]
        text = text[:place] + middle + text[place + 2 :]
    return text


def _case(text: str, generator: random.Random) -> str:
    return generator.choice((str.lower, str.upper, str.title))(text)


def _spacing(text: str, generator: random.Random) -> str:
    """One space in ten, one at least, left out, and as many put into words."""
    spaces = [place for place, character in enumerate(text) if character == " "]
    inner = [place for place in range(1, len(text)) if text[place - 1].isalpha() and text[place].isalpha()]
    count = 1 + len(spaces) // 10
    out = set(generator.sample(spaces, min(len(spaces), count)))
    into = set(generator.sample(inner, min(len(inner), count)))
    return "".join((" " if place in into else "") + ("" if place in out else character) for place, character in enumerate(text))


def _punctuation(text: str, generator: random.Random) -> str:
    """Without any, or with a sentence's end where there was none."""
    bare = " ".join(re.sub(r"[^\w\s<>]", " ", text).split())
    return bare if generator.random() < 0.5 and bare != text else text.rstrip(".!?… ") + generator.choice(("", "!!", "...", "?!"))


def _truncation(text: str, generator: random.Random) -> str:
    """Without its last words, a quarter at most."""
    words = text.split(" ")
    return " ".join(words[: len(words) - generator.randint(1, max(1, len(words) // 4))])


_PERTURBATIONS: dict[Perturbation, Callable[[str, random.Random], str]] = {
    "typos": _typos,
    "case": _case,
    "spacing": _spacing,
    "punctuation": _punctuation,
    "truncation": _truncation,
}


def swap_words(text: str, one: str, other: str) -> str:
    """Each of the two words in place of the other, whole words only, a capital first letter kept."""
    both = {one.lower(): other, other.lower(): one}

    def swapped(match: re.Match[str]) -> str:
        found = both[match[0].lower()]
        return found[:1].upper() + found[1:] if match[0][:1].isupper() else found

    return re.sub(rf"(?<!\w)(?:{re.escape(one)}|{re.escape(other)})(?!\w)", swapped, text, flags=re.IGNORECASE)
