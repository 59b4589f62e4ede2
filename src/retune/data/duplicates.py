"""Near-duplicates: pairs of texts whose sets of word 3-grams have a Jaccard similarity of at least a threshold.

The join is exact, so whether two texts are near depends on these two alone: not on the other rows, not on an approximation. Candidates
come from prefix filtering: with their shingles in one common order, two sets of Jaccard >= t share one of the first
`n - ceil(t * n) + 1` shingles of each (n: size of the set). The order is rarest first, so that few pairs are looked at.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

__all__ = ["Resolution", "jaccard", "near_pairs", "resolve", "shingles"]

_WORD = re.compile(r"\w+")
_EPSILON = 1e-9
_CHUNK = 512

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Resolution:
    """What becomes of each text, in order; -1 stands for none."""

    blocker: Ints
    """Earliest kept text in another split that this one is near to: it leaves."""
    group: Ints
    """Earliest text of the connected component of kept, near texts; itself where it has no such neighbour."""


def shingles(text: str) -> frozenset[str]:
    """Word 3-grams without case; the words themselves in a text of fewer than 3; the text itself where it has none."""
    words = _WORD.findall(text.casefold())
    if not words:
        return frozenset([text])
    if len(words) < 3:
        return frozenset(words)
    return frozenset(" ".join(words[start : start + 3]) for start in range(len(words) - 2))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def resolve(texts: Sequence[str], splits: Sequence[str], threshold: float) -> Resolution:
    """Walks the texts in their order. One that is near an earlier kept text of another split leaves; near texts of a split form groups.

    Later texts never change what becomes of an earlier one (but for groups that they join).
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(splits))}
    split = np.array([numbers[name] for name in splits], dtype=np.int64)
    blocker = np.full(len(texts), -1, dtype=np.int64)
    parent = list(range(len(texts)))

    def root(text: int) -> int:
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for later, earlier in near_pairs(texts, threshold):
        rows, starts = np.unique(later, return_index=True)
        for row, near in zip(rows.tolist(), np.split(earlier, starts[1:]), strict=True):
            kept = near[blocker[near] < 0]
            elsewhere = kept[split[kept] != split[row]]
            if len(elsewhere):
                blocker[row] = elsewhere[0]
                continue
            roots = {root(text) for text in kept.tolist()} | {row}
            for text in roots:
                parent[text] = min(roots)
    return Resolution(blocker, np.array([root(text) for text in range(len(texts))], dtype=np.int64))


def near_pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[Ints, Ints]]:
    """Chunks of near pairs as (later, earlier) places in `texts`, sorted by both; a text's pairs never span chunks."""
    sets = [shingles(text) for text in texts]
    frequency = Counter(shingle for one in sets for shingle in one)
    order = {shingle: place for place, (shingle, _) in enumerate(sorted(frequency.items(), key=lambda item: (item[1], item[0])))}
    places = [sorted(order[shingle] for shingle in one) for one in sets]
    sizes = np.array([len(one) for one in sets], dtype=np.int64)
    prefixes = [one[: len(one) - math.ceil(threshold * len(one) - _EPSILON) + 1] for one in places]
    whole, prefix = _matrix(places, len(order)), _matrix(prefixes, len(order))
    by_shingle = prefix.T.tocsr()
    for start in range(0, len(texts), _CHUNK):
        found = (prefix[start : start + _CHUNK] @ by_shingle).tocoo()
        later, earlier = found.row.astype(np.int64) + start, found.col.astype(np.int64)
        small, large = np.minimum(sizes[later], sizes[earlier]), np.maximum(sizes[later], sizes[earlier])
        likely = (earlier < later) & (small >= threshold * large - _EPSILON)
        later, earlier = later[likely], earlier[likely]
        shared = np.concatenate([np.zeros(0, dtype=np.int64), *_shared(whole, later, earlier)])
        near = shared >= threshold * (sizes[later] + sizes[earlier] - shared) - _EPSILON
        later, earlier = later[near], earlier[near]
        by_both = np.lexsort((earlier, later))
        if len(by_both):
            yield later[by_both], earlier[by_both]


def _matrix(places: Sequence[Sequence[int]], width: int) -> Any:
    """[texts, shingles], 1 where the text has the shingle."""
    indptr = np.concatenate([[0], np.cumsum([len(one) for one in places])])
    indices = np.fromiter((place for one in places for place in one), dtype=np.int64, count=int(indptr[-1]))
    return sparse.csr_matrix((np.ones(len(indices), dtype=np.int32), indices, indptr), shape=(len(places), width))


def _shared(whole: Any, later: Ints, earlier: Ints, pairs: int = 100_000) -> Iterator[Ints]:
    """Number of shingles that the two texts of each pair share."""
    for start in range(0, len(later), pairs):
        both = whole[later[start : start + pairs]].multiply(whole[earlier[start : start + pairs]])
        yield np.asarray(both.sum(axis=1), dtype=np.int64).ravel()
