"""ROUGE-1, ROUGE-2 and ROUGE-L, F-measure (Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004).

The figures are those of the package rouge-score 0.1.2 without stemming (a test compares them): words are runs of a to z and 0 to 9
without case, so a text in another script has none and scores 0. That package is a dependency of the tests alone: it is published as
source only, brings nltk and absl-py along, and takes rows x columns steps for a longest common subsequence.
"""

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["ROUGE", "rouge"]

ROUGE = ("rouge1", "rouge2", "rougeL")
_WORD = re.compile(r"[a-z0-9]+")


def rouge(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of a text, 0 to 1, each against the reference that it is highest for."""
    words = _WORD.findall(prediction.lower())
    scores = [_scores(words, _WORD.findall(reference.lower())) for reference in references]
    return tuple(max(of_references) for of_references in zip(*scores, strict=True))


def _scores(prediction: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    common = longest_common_subsequence(prediction, reference)
    return _ngrams(prediction, reference, 1), _ngrams(prediction, reference, 2), _f(common, len(prediction), len(reference))


def _ngrams(prediction: Sequence[str], reference: Sequence[str], n: int) -> float:
    ours, theirs = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (prediction, reference))
    return _f((ours & theirs).total(), ours.total(), theirs.total())


def _f(common: int, predicted: int, referenced: int) -> float:
    """Harmonic mean of precision and recall: 2 common / (predicted + referenced)."""
    return 2 * common / (predicted + referenced) if common else 0.0


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, one integer operation per word of `other` (bit-parallel: Hyyrö, AWOCA 2004).

    Bit i of `row` is 0 where the length rises at word i of `one`.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & every
    return len(one) - row.bit_count()
