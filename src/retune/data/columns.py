"""What `retune.text` does to a text, done to a whole column: one pass clears the texts that need nothing, the others go one by one."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from retune.text import clean, normalise, redact

__all__ = ["arrow", "as_series", "cleaned", "in_one_text", "joined", "normalised", "redacted", "texts_of"]

# Characters that stand for themselves in any company: printable, no white space, composed whatever stands beside them, and not &.
# Digits and @ are apart, since they may be part of what is redacted. No text outside these ranges is wrong for it, only slower.
_PLAIN = (
    "!-%'-/:-?A-~"
    "\u00a1-\u00ac\u00ae-\u02ff"  # Latin, without the no-break space and the soft hyphen
    "\u0400-\u0482\u048a-\u052f"  # Cyrillic
    "\u2010-\u2027\u20ac"  # dashes, quotation marks, the euro
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"  # kana, Han, Hangul
)
_NORMAL = rf"\A(?:[{_PLAIN}0-9@]+(?: [{_PLAIN}0-9@]+)*)?\z"
_WITHIN = f"{_PLAIN} \t\r\n"
# Six digits at most and no @: `retune.text.redact` looks for no mail address and no number in it.
_IMPERSONAL = rf"\A[{_WITHIN}]*(?:[0-9][{_WITHIN}]*){{0,6}}\z"


_SOME = 10_000


def normalised(texts: pa.Array) -> pa.Array:
    """`retune.text.normalise` of each text; null stays."""
    return _each(texts, pc.match_substring_regex(texts, _NORMAL), normalise)


def cleaned(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """`retune.text.clean` of each text; NaN stays."""
    texts = arrow(column)
    sure = pc.and_(pc.match_substring_regex(texts, _NORMAL), pc.match_substring_regex(texts, _IMPERSONAL))
    return as_series(_each(texts, sure, clean), column)


def redacted(column: "pd.Series[Any]") -> tuple["pd.Series[Any]", Mapping[str, int]]:
    """`retune.text.redact` of each text, and the replacements of all of them by kind; NaN stays."""
    counts: Counter[str] = Counter()

    def one(text: str) -> str:
        text, found = redact(text)
        for kind, number in found.items():
            counts[kind] += number
        return text

    texts = arrow(column)
    return as_series(_each(texts, pc.match_substring_regex(texts, _IMPERSONAL), one), column), counts


def joined(columns: Sequence[pa.Array], separator: str) -> list[bytes]:
    """The cells of each row in UTF-8, with the separator between them."""
    cells = pc.binary_join_element_wise(*columns, pa.scalar(separator, columns[0].type))
    return list(cells.cast(pa.large_binary()).to_pylist())


def in_one_text(rows: pd.DataFrame, inputs: Sequence[str]) -> "pd.Series[Any]":
    """Each row's inputs, one to a line; a single input as it is, not a copy."""
    text = rows[inputs[0]]
    for name in inputs[1:]:
        text = text + "\n" + rows[name]
    return text


def texts_of(column: "pd.Series[Any]") -> Iterator[str]:
    """The texts one by one; only some of them are Python's at a time."""
    texts = arrow(column)
    for start in range(0, len(texts), _SOME):
        yield from texts[start : start + _SOME].to_pylist()


def arrow(column: "pd.Series[Any]") -> pa.Array:
    """The texts as pandas holds them."""
    texts = pa.array(column, type=pa.large_string(), from_pandas=True)
    return texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts


def as_series(texts: pa.Array, like: "pd.Series[Any]") -> "pd.Series[Any]":
    """The texts in place of those of `like`."""
    return pd.Series(texts.to_pandas().array, index=like.index, name=like.name, dtype="str")


def _each(texts: pa.Array, sure: pa.Array, function: Callable[[str], str]) -> pa.Array:
    """The texts, the function applied to those that are not sure to be left as they are."""
    doubtful = pc.invert(pc.fill_null(sure, True))
    changed = [function(text) for text in texts.filter(doubtful).to_pylist()]
    return pc.replace_with_mask(texts, doubtful, pa.array(changed, texts.type)) if changed else texts
