"""The gate's paired bootstrap of BLEU and ROUGE-L against scoring each resample's texts anew with the libraries.

2,000 rows with several references each, every row its own group, and 2,000 resamples. Scoring one resample anew takes seconds, so each
round does it for one, and what all of them would take is extrapolated. The same draws must give the same gain, which is looked at for each.
The texts are those of E2E NLG in the folder e2e_nlg of RETUNE_SHARED_DATA, or else random words.
"""

import os
from collections.abc import Callable
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from rouge_score.rouge_scorer import RougeScorer
from rows import Row, interleaved, of_rounds, ratios, say
from sacrebleu.metrics.bleu import BLEU

from retune.evaluation import comparison, generation
from retune.text import join_references, split_references

__all__ = ["measure"]

FIGURE = "paired bootstrap"
TEXT = Path(os.environ.get("RETUNE_SHARED_DATA", Path(__file__).parents[2] / "shared/data")) / "e2e_nlg/devel-fixed.no-ol.csv"
ROWS, RESAMPLES, ROUNDS = 2_000, 2_000, 5
QUICK = 100, 200, 2
MOST = 4
"""References of a row: some inputs have more than 30."""
CONFIDENCE, SEED = 0.95, 0


def measure(quick: bool) -> list[Row]:
    rows, resamples, rounds = QUICK if quick else (ROWS, RESAMPLES, ROUNDS)
    references, source = _references(rows)
    candidate, champion = (_answered(references, dropped) for dropped in (0.1, 0.3))
    several = sum(len(of_row) - 1 for of_row in references) / rows
    case = f"{source}, {rows:,} rows of {several:.1f} references, {resamples:,} resamples"
    found = []
    for metric, name, unit, plain in (("bleu", "BLEU", "of 100", _bleu), ("rougeL", "ROUGE-L", "of 1", _rouge)):
        found += _metric(metric, f"{name}, {case}", unit, plain, candidate, champion, resamples, rounds)
    return found


def _metric(
    metric: str,
    case: str,
    unit: str,
    plain: Callable[[pd.DataFrame], float],
    candidate: pd.DataFrame,
    champion: pd.DataFrame,
    resamples: int,
    rounds: int,
) -> list[Row]:
    draws = next(comparison._draws(np.ones(len(candidate), dtype=np.int64), rounds, SEED))  # the first of those that the gate draws
    remaining = iter(draws)
    gains = []

    def resampled() -> None:
        of_resample = np.repeat(np.arange(len(candidate)), next(remaining).astype(int))
        gains.append(plain(candidate.iloc[of_resample]) - plain(champion.iloc[of_resample]))

    def retune() -> None:
        generation._rouge.cache_clear()  # else only the first round would score the rows
        comparison.paired_bootstrap(candidate, champion, metric, [], CONFIDENCE, resamples, SEED)

    seconds = interleaved({"plain": resampled, "retune": retune}, rounds, warm_up=False)
    off = np.abs(np.array(gains) - _fast(metric, draws, candidate, champion))
    whole = [resamples * one for one in seconds["plain"]]
    say(f"{metric}: {seconds['plain'][0]:.2f} s for each resample scored anew, {seconds['retune'][0]:.2f} s for all of Retune's")
    return [
        ratios(FIGURE, f"{case}: each resample scored anew / Retune", whole, seconds["retune"]),
        of_rounds(FIGURE, f"{case}: scored anew, from {rounds} of them", whole, "s"),
        of_rounds(FIGURE, f"{case}: Retune", seconds["retune"], "s"),
        of_rounds(FIGURE, f"{case}: difference of a resample's gain, {rounds} of them", off.tolist(), unit),
    ]


def _fast(metric: str, draws: npt.NDArray[np.float64], candidate: pd.DataFrame, champion: pd.DataFrame) -> npt.NDArray[np.float64]:
    """The gate's gain in each of the draws: [R, N] -> [R]."""
    sums, total = generation.GENERATION[metric]
    return total(draws @ sums(candidate)) - total(draws @ sums(champion))


def _bleu(frame: pd.DataFrame) -> float:
    """sacreBLEU's own corpus score."""
    references = zip_longest(*map(split_references, frame["target"]))
    return float(BLEU().corpus_score(list(frame["prediction"]), list(references)).score)


def _rouge(frame: pd.DataFrame) -> float:
    """Mean of rouge-score's F, each row's best reference."""
    scorer = RougeScorer(["rougeL"])
    scores = (scorer.score_multi(split_references(target), said) for said, target in zip(frame["prediction"], frame["target"], strict=True))
    return float(np.mean([score["rougeL"].fmeasure for score in scores]))


def _references(rows: int) -> tuple[list[list[str]], str]:
    """Texts of the same meaning, several per row, and where they are from. Of E2E NLG each text of an input comes first in a row once."""
    if not TEXT.is_file():
        rng = np.random.default_rng(SEED)
        words = [f"word{number}" for number in range(2_000)]
        chances = 1 / np.arange(1, 2_001)
        texts = (" ".join(rng.choice(words, rng.integers(8, 30), p=chances / chances.sum())) for _ in range(4 * rows))
        return [list(islice(texts, 4)) for _ in range(rows)], "random words"
    inputs = pd.read_csv(TEXT).groupby("mr", sort=False)["ref"].agg(list)
    several = (texts for texts in inputs if len(texts) > 2)
    turned = ([text, *(texts[:place] + texts[place + 1 :])[:MOST]] for texts in several for place, text in enumerate(texts))
    found = list(islice(turned, rows))
    if len(found) < rows:
        raise ValueError(f"{TEXT} must hold {rows} texts of inputs with three or more, got {len(found)}")
    return found, "E2E NLG"


def _answered(references: list[list[str]], dropped: float) -> pd.DataFrame:
    """Predictions frame: each row's first text without this share of its words, against the others."""
    rng = np.random.default_rng(round(100 * dropped))
    said = [" ".join(word for word in of_row[0].split() if rng.random() >= dropped) for of_row in references]
    return pd.DataFrame(
        {
            "id": range(len(said)),
            "group": range(len(said)),
            "target": [join_references(of_row[1:]) for of_row in references],
            "prediction": said,
            "reference_nats": 1.0,
            "reference_tokens": 1,
            "truncated": False,
        }
    )
