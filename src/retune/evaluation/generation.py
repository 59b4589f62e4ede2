"""Metrics of task: generation, each a function of sums over rows.

A row is one input with one prediction and one or more references. ROUGE takes the best reference, an exact match any, BLEU and chrF
score against all of them as sacreBLEU does, the perplexity is over the tokens of all. BLEU and chrF of a corpus are no means over rows:
both follow from counts of n-grams summed over the rows, so that a resample's score costs one sum.

Letters: N rows, R resamples (1 for a whole split), S sums.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import zip_longest

import numpy as np
import numpy.typing as npt
import pandas as pd
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from retune.evaluation.rouge import ROUGE, rouge
from retune.evaluation.sums import Floats, mean, value_and_one
from retune.text import split_references

__all__ = ["GENERATION", "exact_matches", "measured", "output_words", "signatures"]

ORDERS = 4
"""Longest n-gram of words in BLEU."""


def signatures(predictions: pd.DataFrame) -> dict[str, str]:
    """How BLEU and chrF were computed, in sacreBLEU's own words: number of references, tokens, smoothing, version."""
    return {"bleu": _counts(predictions, BLEU())[1], "chrf": _counts(predictions, CHRF())[1]}


def exact_matches(predictions: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Whether the prediction is one of the references, white space around them aside: [N]."""
    pairs = zip(predictions["prediction"], _references(predictions), strict=True)
    return np.array([isinstance(said, str) and said.strip() in {r.strip() for r in references} for said, references in pairs])


def output_words(predictions: pd.DataFrame) -> Floats:
    """Words of each prediction, told apart by white space: [N]."""
    return np.array([len(said.split()) for said in _said(predictions)], dtype=np.float64)


def _said(predictions: pd.DataFrame) -> list[str]:
    """A missing prediction is an empty one."""
    return list(predictions["prediction"].fillna("").astype(str))


def _references(predictions: pd.DataFrame) -> list[list[str]]:
    return [split_references(target) for target in predictions["target"].astype(str)]


@lru_cache(maxsize=100_000)
def _rouge(said: str, target: str) -> tuple[float, ...]:
    """Remembered, since each of the three figures and each slice asks for it."""
    return rouge(said, split_references(target))


def _rouge_rows(predictions: pd.DataFrame, figure: str) -> Floats:
    pairs = zip(_said(predictions), predictions["target"].astype(str), strict=True)
    return value_and_one(np.array([_rouge(*pair)[ROUGE.index(figure)] for pair in pairs]))


def _counts(predictions: pd.DataFrame, metric: BLEU | CHRF) -> tuple[Floats, str]:
    """sacreBLEU's counts of each row, [N, S], and its signature. A missing further reference is None to sacreBLEU."""
    references = list(zip_longest(*_references(predictions)))
    # Not its public interface, which gives scores only: the version is pinned, and tests compare with corpus_score.
    rows = metric._extract_corpus_statistics(_said(predictions), references)
    return np.array(rows, dtype=np.float64), str(metric.get_signature())


def _bleu(sums: Floats) -> Floats:
    """Corpus BLEU, 0 to 100, from lengths of predictions and references, matches and n-grams of each order: [R, 10] -> [R].

    Exponential smoothing: the k-th order without a match counts 1 / 2^k matches. Without any match, or n-grams of some order: 0.
    """
    length, wanted = sums[:, 0], sums[:, 1]
    matches, total = sums[:, 2 : 2 + ORDERS], sums[:, 2 + ORDERS :]
    scored = matches.any(axis=1) & total.all(axis=1)
    smoothed = np.where(matches == 0, 0.5 ** (matches == 0).cumsum(axis=1), matches)
    precision = np.exp(np.log(smoothed / np.maximum(total, 1)).mean(axis=1))
    brevity = np.exp(np.minimum(0, 1 - wanted / np.maximum(length, 1)))
    return np.where(scored, 100 * brevity * precision, 0.0)


def _chrf(sums: Floats) -> Floats:
    """Corpus chrF2, 0 to 100, from n-grams of predictions and references and matches of each order: [R, 18] -> [R].

    F of precision and recall averaged over the orders that both sides have, recall weighing twice.
    """
    orders = sums.reshape(len(sums), -1, 3)
    predicted, referenced, matches = orders[..., 0], orders[..., 1], orders[..., 2]
    there = (predicted > 0) & (referenced > 0)
    count = np.maximum(there.sum(axis=1), 1)
    precision, recall = (
        np.divide(matches, n, out=np.zeros_like(matches), where=there).sum(axis=1) / count for n in (predicted, referenced)
    )
    weight = CHRF.BETA**2
    both = weight * precision + recall
    return np.asarray(100 * np.divide((1 + weight) * precision * recall, both, out=np.zeros_like(both), where=both > 0), dtype=np.float64)


def _columns(predictions: pd.DataFrame, names: Sequence[str]) -> Floats:
    return predictions[list(names)].to_numpy(dtype=np.float64)


def _losses_and_bytes(predictions: pd.DataFrame) -> Floats:
    sizes = [sum(len(text.encode()) for text in references) for references in _references(predictions)]
    return np.column_stack([predictions["reference_nats"].to_numpy(dtype=np.float64), sizes])


def _exp_mean(sums: Floats) -> Floats:
    return np.asarray(np.exp(mean(sums)), dtype=np.float64)


def measured(metric: str, predictions: pd.DataFrame) -> bool:
    """Whether the predictions hold what the metric is made of, where not every evaluation does."""
    return all(column in predictions.columns for column in _OPTIONAL.get(metric, ()))


_OPTIONAL = {"fluency": ("output_nats", "output_tokens"), "relevance": ("relevance",)}
"""Metric -> its columns, which an evaluation without such a model leaves out."""


GENERATION: dict[str, tuple[Callable[[pd.DataFrame], Floats], Callable[[Floats], Floats]]] = {
    **{name: (partial(_rouge_rows, figure=name), mean) for name in ROUGE},
    "bleu": (lambda predictions: _counts(predictions, BLEU())[0], _bleu),
    "chrf": (lambda predictions: _counts(predictions, CHRF())[0], _chrf),
    "exact_match": (lambda predictions: value_and_one(exact_matches(predictions)), mean),
    "perplexity": (partial(_columns, names=("reference_nats", "reference_tokens")), _exp_mean),
    "perplexity_per_byte": (_losses_and_bytes, _exp_mean),
    "fluency": (partial(_columns, names=_OPTIONAL["fluency"]), _exp_mean),
    "relevance": (lambda predictions: value_and_one(predictions["relevance"].to_numpy(dtype=np.float64)), mean),
    "empty_outputs": (lambda predictions: value_and_one(output_words(predictions) == 0), mean),
    "truncated_outputs": (lambda predictions: value_and_one(predictions["truncated"].to_numpy(dtype=bool)), mean),
    "output_words": (lambda predictions: value_and_one(output_words(predictions)), mean),
}
"""Metric -> what each row adds, [N, S], and the metric from the sums over rows, from [R, S] to [R]."""
