"""Near-duplicates: pairs of texts whose sets of word 3-grams have a Jaccard similarity of at least a threshold.

The join is exact, so whether two texts are near depends on these two alone: not on the other rows, not on an approximation. Candidates
come from prefix filtering: with their shingles in one common order, two sets of Jaccard >= t share one of the first
`n - ceil(t * n) + 1` shingles of each (n: size of the set). The order is rarest first, so that few pairs are looked at.

Shingles are numbers here, each distinct one its own, and all of the work is on arrays: about 8 bytes a word stay for the texts, and the
candidates of a block of texts at a time. A shingle of one text alone makes nobody near: it counts for the size of its set, no more.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

__all__ = ["Resolution", "jaccard", "near_pairs", "resolve", "shingles"]

_WORD = re.compile(r"\w+")
_ASCII_WORDS = "".join(sign if sign.isalnum() or sign == "_" else " " for sign in map(chr, range(128)))
"""Each sign of ASCII, a space where it is in no word."""
_EPSILON = 1e-9
_TEXTS = 1_000
_SLOTS = 24
"""Bits of a hash by which shingles that repeat are looked for."""
_HASHED = 100_000
"""Shingles that are hashed at a time."""
_CANDIDATES = 1_000_000

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
    words = _words_of(text)
    if len(words) < 3:
        return frozenset(words)
    return frozenset(" ".join(words[start : start + 3]) for start in range(len(words) - 2))


def _words_of(text: str) -> list[str]:
    """Without case; the text itself where it has none."""
    folded = text.casefold()
    # For ASCII the same words in half the time.
    return (folded.translate(_ASCII_WORDS).split() if folded.isascii() else _WORD.findall(folded)) or [text]


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def resolve(texts: Iterable[str], splits: Iterable[str], threshold: float) -> Resolution:
    """Walks the texts in their order. One that is near an earlier kept text of another split leaves; near texts of a split form groups.

    Later texts never change what becomes of an earlier one (but for groups that they join).
    """
    numbers: dict[str, int] = {}
    split = np.fromiter((numbers.setdefault(name, len(numbers)) for name in splits), dtype=np.int64)
    blocker = np.full(len(split), -1, dtype=np.int64)
    parent = np.arange(len(split))

    def roots_of(found: Ints) -> Ints:
        """Each once. All at a time: a text may be near to every one before it."""
        roots = parent[found]
        while not np.array_equal(above := parent[roots], roots):
            roots = above
        parent[found] = roots
        return np.unique(roots)

    for later, earlier in near_pairs(texts, threshold):
        rows, starts = np.unique(later, return_index=True)
        for row, near in zip(rows.tolist(), np.split(earlier, starts[1:]), strict=True):
            kept = near[blocker[near] < 0]
            elsewhere = kept[split[kept] != split[row]]
            if len(elsewhere):
                blocker[row] = elsewhere[0]
                continue
            roots = roots_of(np.append(kept, row))
            parent[roots] = roots[0]
    while not np.array_equal(above := parent[parent], parent):
        parent = above
    return Resolution(blocker, parent)


def near_pairs(texts: Iterable[str], threshold: float) -> Iterator[tuple[Ints, Ints]]:
    """Chunks of near pairs as (later, earlier) places in `texts`, sorted by both; a text's pairs never span chunks."""
    sizes, whole = _sets(texts)
    kept = np.diff(whole.indptr)
    # Shingles are numbered rarest first, and those of one text alone come before all others: a set's prefix begins with its lone ones.
    prefix_length = sizes - np.ceil(threshold * sizes - _EPSILON).astype(np.int64) + 1 - (sizes - kept)
    place = np.arange(len(whole.indices)) - np.repeat(whole.indptr[:-1], kept)
    in_prefix = place < np.repeat(prefix_length, kept)
    text_of = np.repeat(np.arange(len(sizes)), kept)[in_prefix]
    for later, earlier in _candidates(text_of, whole.indices[in_prefix]):
        small, large = np.minimum(sizes[later], sizes[earlier]), np.maximum(sizes[later], sizes[earlier])
        likely = small >= threshold * large - _EPSILON
        later, earlier = later[likely], earlier[likely]
        both = np.unique(later * len(sizes) + earlier)
        later, earlier = np.divmod(both, len(sizes))
        shared = np.concatenate([np.zeros(0, dtype=np.int64), *_shared(whole, later, earlier)])
        near = shared >= threshold * (sizes[later] + sizes[earlier] - shared) - _EPSILON
        if near.any():
            yield later[near], earlier[near]


def _sets(texts: Iterable[str]) -> tuple[Ints, Any]:
    """Size of each text's set of shingles; and [texts, shingles] as a sparse matrix, 1 where the text has the shingle.

    The matrix holds the shingles that several texts have, columns rarest first, sorted within a row.
    """
    words, counts = _words(texts)
    text_of, shingle = _numbered(words, counts)
    del words
    sizes = np.where(counts < 3, counts, counts - 2)
    likely = _likely_again(shingle)
    text_of, shingle = text_of[likely], shingle[likely]
    # Two numbers in one are sorted many times faster than an order is found for them: first (shingle, text), then (text, column).
    text_of = text_of[np.argsort(shingle)]
    shingle.sort()
    both: Ints = np.cumsum(_new(shingle), dtype=np.int64)
    both *= len(counts)
    both += text_of
    del shingle, text_of
    both.sort()
    new = _new(both)
    sizes -= np.bincount(both[~new] % max(1, len(counts)), minlength=len(counts))
    number, owner = np.divmod(both[new], max(1, len(counts)))
    del both, new
    frequency = np.bincount(number)
    shared = np.flatnonzero(frequency > 1)
    column = np.empty(len(frequency), dtype=np.int32)
    column[shared[np.argsort(frequency[shared], kind="stable")]] = np.arange(len(shared), dtype=np.int32)
    several = (frequency > 1)[number]
    cells = owner[several] * max(1, len(shared))
    cells += column[number[several]]
    del number, owner, several
    cells.sort()
    owner, columns = np.divmod(cells, max(1, len(shared)))
    del cells
    indptr = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(counts)))])
    ones = np.ones(len(columns), dtype=np.int8)
    return sizes, sparse.csr_matrix((ones, columns.astype(np.int32), indptr), shape=(len(counts), len(shared)))


def _likely_again(numbers: Ints) -> npt.NDArray[np.bool_]:
    """True for each number that stands there more than once, and for a few others."""
    blocks = [numbers[start : start + _HASHED] for start in range(0, max(1, len(numbers)), _HASHED)]
    hashes = np.concatenate([_hashes(block) for block in blocks])
    hashes.sort()
    table = np.zeros(1 << _SLOTS, dtype=bool)
    table[hashes[~_new(hashes)] >> (32 - _SLOTS)] = True
    del hashes
    return np.concatenate([table[_hashes(block) >> (32 - _SLOTS)] for block in blocks])


def _hashes(numbers: Ints) -> npt.NDArray[np.uint32]:
    """Multiplicative hashing (Knuth, The Art of Computer Programming, 6.4)."""
    products = numbers.astype(np.uint64)
    products *= np.uint64(0x9E3779B97F4A7C15)
    products >>= np.uint64(32)
    return products.astype(np.uint32)


def _new(ordered: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each number differs from the one before it."""
    new = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return new


def _words(texts: Iterable[str]) -> tuple[npt.NDArray[np.int32], Ints]:
    """The words of all texts as numbers from 1, and how many each text has; a text without words is a word of its own."""
    numbers: defaultdict[str, int] = defaultdict(count(1).__next__)
    pieces, counts = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int64)]
    source = iter(texts)
    while chunk := [_words_of(text) for text in islice(source, _TEXTS)]:
        counts.append(np.array([len(words) for words in chunk], dtype=np.int64))
        flat = map(numbers.__getitem__, chain.from_iterable(chunk))
        pieces.append(np.fromiter(flat, dtype=np.int32, count=int(counts[-1].sum())))
    return np.concatenate(pieces), np.concatenate(counts)


def _numbered(words: npt.NDArray[np.int32], counts: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
    """Text and number of each shingle, text by text; a text of fewer than 3 words has these as its shingles."""
    most = int(words.max(initial=0)) + 1
    starts, lengths = np.cumsum(counts) - counts, np.where(counts < 3, counts, counts - 2)
    fits = most**3 < 2**63
    text_of, number = np.empty(lengths.sum(), dtype=np.int32), np.empty(lengths.sum(), dtype=np.int64)
    thirds = np.empty(0 if fits else len(number), dtype=np.int32)
    at = 0
    for first in range(0, len(counts), _TEXTS):
        block = slice(first, first + _TEXTS)
        texts, pairs, third = _triples(words, counts[block], starts[block], most)
        here = slice(at, at + len(texts))
        text_of[here] = texts + np.int32(first)
        number[here] = pairs * most + third if fits else pairs
        thirds[here] = third[:0] if fits else third
        at = here.stop
    if fits:
        return text_of, number
    # So many words that a number for every three of them would not fit: the pairs that there are get numbers of their own.
    return text_of, np.unique(number, return_inverse=True)[1] * most + thirds


def _triples(words: npt.NDArray[np.int32], counts: Ints, starts: Ints, most: int) -> tuple[npt.NDArray[np.int32], Ints, Any]:
    """Of each shingle of some texts: the text, a number for its first two words, and its third; 0 is no word, as in a short text."""
    short = counts < 3
    lengths = np.where(short, counts, counts - 2)
    place = np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    triple = np.repeat(~short, lengths)
    second = np.where(triple, words[np.minimum(place + 1, len(words) - 1)], 0)
    third = np.where(triple, words[np.minimum(place + 2, len(words) - 1)], 0)
    text_of = np.repeat(np.arange(len(counts), dtype=np.int32), lengths)
    return text_of, words[place].astype(np.int64) * most + second, third


def _candidates(text_of: Ints, shingle: npt.NDArray[np.int32]) -> Iterator[tuple[Ints, Ints]]:
    """(later, earlier) texts that share a shingle, up to as often as they share one; blocks of texts in order.

    `text_of` and `shingle`: places in the sets' prefixes, by text.
    """
    order = np.argsort(shingle, kind="stable")
    texts = text_of[order]  # of each shingle, in order
    grouped = shingle[order]
    begin = np.concatenate([[True], grouped[1:] != grouped[:-1]]) if len(grouped) else np.zeros(0, dtype=bool)
    starts = np.maximum.accumulate(np.where(begin, np.arange(len(grouped)), 0))
    start, before = np.empty_like(starts), np.empty_like(starts)
    start[order] = starts
    before[order] = np.arange(len(grouped)) - starts
    del order, grouped, begin, starts
    total = np.cumsum(before)
    most = int(text_of.max(initial=0)) + 1

    def pairs(first: int, last: int) -> tuple[Ints, Ints]:
        several = before[first:last]
        later = np.repeat(text_of[first:last], several)
        within = np.arange(len(later)) - np.repeat(np.cumsum(several) - several, several)
        return later, texts[np.repeat(start[first:last], several) + within]

    at = 0
    while at < len(before):
        done = total[at - 1] if at else 0
        end = max(int(np.searchsorted(total, done + _CANDIDATES, side="right")), at + 1)
        # A text's places stay together.
        end = int(np.searchsorted(text_of, text_of[end - 1], side="right"))
        if total[end - 1] - done <= 2 * _CANDIDATES:
            yield pairs(at, end)
        else:  # a long text may share each of its shingles with every text before it
            found = np.zeros(0, dtype=np.int64)
            while at < end:
                done = total[at - 1] if at else 0
                cut = min(end, max(int(np.searchsorted(total, done + _CANDIDATES, side="right")), at + 1))
                later, earlier = pairs(at, cut)
                found = np.union1d(found, later * most + earlier)
                at = cut
            later, earlier = np.divmod(found, most)
            yield later, earlier
        at = end


def _shared(whole: Any, later: Ints, earlier: Ints, pairs: int = 100_000) -> Iterator[Ints]:
    """Number of shingles that the two texts of each pair share."""
    for start in range(0, len(later), pairs):
        both = whole[later[start : start + pairs]].multiply(whole[earlier[start : start + pairs]])
        yield np.asarray(both.sum(axis=1), dtype=np.int64).ravel()
