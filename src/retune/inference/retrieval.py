"""Which of some texts are most like another one: cosine similarity of TF-IDF over words. scikit-learn is imported where it is needed.

Letters: N texts, M queries, W words.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Nearest"]

WORD = r"\w+"
HELD = 2**22
"""Similarities that are held at a time: 32 MiB of fp64."""
DECIMALS = 9
"""Of a similarity: the last bits differ from one processor to another, and must not decide which text comes first."""


class Nearest:
    """The texts to choose from, weighed by how rare their words are among them. Nothing changes after it is made."""

    def __init__(self, texts: Sequence[str], count: int) -> None:
        """texts: at least one. count: how many are chosen for each query; fewer where there are fewer."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._count, self._size = count, len(texts)
        self._vectorizer = TfidfVectorizer(token_pattern=WORD)
        worded = any(re.search(WORD, text) for text in texts)  # without a single word there is nothing to be alike in
        self._known: Any = self._vectorizer.fit_transform(texts) if worded else None  # [N, W], sparse

    def of(self, queries: Sequence[str], without: Sequence[int | None]) -> list[list[int]]:
        """Numbers of the texts most like each query, the most alike last; of two as alike, the one that stands first among the texts is.

        without: for each query the number of a text that is not to be chosen, [M].
        """
        found: list[list[int]] = []
        step = max(1, HELD // self._size)
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            rows = zip(self._similarities(queries[part]), without[part], strict=True)
            found += [self._chosen(similarities, number) for similarities, number in rows]
        return found

    def _similarities(self, queries: Sequence[str]) -> np.ndarray:
        """[M, N], from 0 to 1."""
        if self._known is None:
            return np.zeros((len(queries), self._size))
        similarities: np.ndarray = (self._vectorizer.transform(queries) @ self._known.T).toarray()
        return similarities.round(DECIMALS)

    def _chosen(self, similarities: np.ndarray, without: int | None) -> list[int]:
        """similarities: [N], changed in place."""
        count = min(self._count, self._size - (without is not None))
        if not count:
            return []
        if without is not None:
            similarities[without] = -1
        least = np.partition(similarities, -count)[-count]
        able = np.flatnonzero(similarities >= least)
        best: list[int] = able[np.argsort(-similarities[able], kind="stable")][:count].tolist()
        return best[::-1]
