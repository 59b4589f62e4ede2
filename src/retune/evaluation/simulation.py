"""How often the gate promotes by luck, and what it finds: the gate's own comparison on releases whose true difference is known.

A release is drawn as the sums that its answers add to a metric, group by group; the comparison is the one that decides for real
(`comparison`), at the level that a policy gives one look. Nothing is tuned and no file is read.

Letters: N rows, G groups, S sums.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta, norm

from retune.evaluation.classification import CLASSIFICATION
from retune.evaluation.comparison import BEYOND, compare_groups, measurably_better, swap_test
from retune.evaluation.generation import GENERATION
from retune.evaluation.sums import Floats, mean, value_and_one
from retune.policy import Policy

__all__ = ["POWER_GAINS", "POWER_ROWS", "SCENARIOS", "FalsePromotions", "Power", "mcnemar_power", "power", "simulate"]

RIGHT, DISAGREE = 0.8, 0.2
"""Share of the rows that a release answers rightly, and on which two that are equally good differ."""
POWER_ROWS = (173, 400, 797, 2000)
"""The demo's two test splits among them."""
POWER_GAINS = (0.02, 0.05, 0.1, 0.15)
BOUND = 0.99
"""Confidence of the binomial intervals."""

Draw = Callable[[np.random.Generator], Floats]
Total = Callable[[Floats], Floats]


@dataclass(frozen=True)
class FalsePromotions:
    """Promotions among comparisons (of the scenario `year`: years with one at least) of releases that are equally good."""

    scenario: str
    confidence: float
    comparisons: int
    false_promotions: int
    false_promotion_rate: float
    lower_bound: float
    upper_bound: float
    """Ends of the exact binomial interval (Clopper & Pearson, Biometrika 26, 1934) at 99 %."""

    @property
    def kept(self) -> bool:
        """Whether the rate that the policy promises is not ruled out from below."""
        return self.lower_bound <= 1 - self.confidence

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Power:
    """Share of the comparisons in which a release that is better by `gain` in accuracy is promoted."""

    rows: int
    gain: float
    power: float
    closed_form: float
    """What McNemar's test has at the same level (Connor, Biometrics 43, 1987)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def promoted(ours: Floats, theirs: Floats, total: Total, policy: Policy, seed: int) -> bool:
    """The gate's gain on one comparison. ours, theirs: [G, S]."""
    level = policy.look_confidence
    better, _ = swap_test(ours, theirs, total, 1, level, seed)
    if better > 1 - level:
        return False  # the lower end is capped at 0 then
    low, _ = compare_groups(ours, theirs, total, 1, level, max(policy.resamples, round(BEYOND / (1 - level))), seed)
    gain = total(ours.sum(0, keepdims=True)).item() - total(theirs.sum(0, keepdims=True)).item()
    return measurably_better(low, gain, policy.min_gain)


def _right(rng: np.random.Generator, chances: Floats) -> Floats:
    """[N] -> [N, 2]"""
    return value_and_one(rng.random(len(chances)) < chances)


def _alike(rng: np.random.Generator, rows: int) -> Floats:
    """Chance of each row to be answered rightly: of such releases, two that are drawn alike differ on DISAGREE of the rows."""
    spread = 1 - DISAGREE / (2 * RIGHT * (1 - RIGHT))  # share of the variance that the rows themselves make
    size = (1 - spread) / spread
    return rng.beta(RIGHT * size, (1 - RIGHT) * size, rows)


def _rows(rng: np.random.Generator) -> tuple[Draw, Total]:
    chances = _alike(rng, 250)
    return lambda draws: _right(draws, chances), mean


def _groups(rng: np.random.Generator) -> tuple[Draw, Total]:
    """100 groups of 1 to 6 near-duplicates, answered alike but for one row in ten."""
    sizes = rng.integers(1, 7, 100)
    chances = _alike(rng, 100)

    def draw(draws: np.random.Generator) -> Floats:
        right = draws.random(100) < chances
        others = draws.binomial(sizes - 1, 0.1)
        return np.column_stack([np.where(right, sizes - others, others), sizes]).astype(np.float64)

    return draw, mean


def _macro_f1(rng: np.random.Generator) -> tuple[Draw, Total]:
    """Three labels, the rarest a tenth of 250 rows."""
    target = rng.choice(3, 250, p=[0.6, 0.3, 0.1])
    chances = _alike(rng, 250)
    every = np.arange(3)

    def draw(draws: np.random.Generator) -> Floats:
        other = (target + draws.integers(1, 3, 250)) % 3
        said = np.where(draws.random(250) < chances, target, other)
        ours, theirs = said[:, None] == every, target[:, None] == every
        return np.concatenate([ours & theirs, ours, theirs], axis=1).astype(np.float64)

    return draw, CLASSIFICATION["macro_f1"][1]


@lru_cache(maxsize=1)
def _sentences() -> Floats:
    """BLEU's counts of 150 sentences under 20 corruptions each, [150, 20, S]."""
    rng = np.random.default_rng(1)
    said, wanted = [], []
    for _ in range(150):
        words = rng.integers(60, size=rng.integers(6, 20))
        for _ in range(20):
            changed = np.where(rng.random(len(words)) < rng.beta(1, 3), rng.integers(60, size=len(words)), words)
            said.append(" ".join(f"w{word}" for word in changed))
            wanted.append(" ".join(f"w{word}" for word in words))
    counts = GENERATION["bleu"][0](pd.DataFrame({"prediction": said, "target": wanted}))
    return counts.reshape(150, 20, -1)


def _bleu(rng: np.random.Generator) -> tuple[Draw, Total]:  # noqa: ARG001 - the sentences stay, the corruptions are drawn
    counts = _sentences()
    return lambda draws: counts[np.arange(150), draws.integers(20, size=150)], GENERATION["bleu"][1]


SCENARIOS: dict[str, Callable[[np.random.Generator], tuple[Draw, Total]]] = {
    "accuracy, 250 rows": _rows,
    "accuracy, 100 groups of near-duplicates": _groups,
    "macro_f1, 250 rows, 3 labels": _macro_f1,
    "bleu, 150 rows": _bleu,
}
"""What is compared -> a test split, drawn: how a release's answers to it are drawn, [G, S], and the metric of them."""


def simulate(comparisons: int, policy: Policy, seed: int) -> Iterator[FalsePromotions]:
    """Equal releases: every scenario as single looks, then years of weekly looks at one split, the champion changing with each promotion.

    A single look stands alone, at the whole of `policy.confidence`; a year shares it out.
    """
    single = policy.model_copy(update={"looks_per_test_split": 1})
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        rng = np.random.default_rng([seed, number])
        false = 0
        for trial in range(comparisons):
            draw, total = scenario(rng)
            false += promoted(draw(rng), draw(rng), total, single, trial)
        yield _counted(name, policy.confidence, comparisons, false)
    rng = np.random.default_rng([seed, len(SCENARIOS)])
    weeks = policy.looks_per_test_split
    false = sum(_a_year(rng, policy, weeks) for _ in range(comparisons))
    yield _counted(f"year of {weeks} looks at one test split, accuracy, 250 rows", policy.confidence, comparisons, false)


def _a_year(rng: np.random.Generator, policy: Policy, looks: int) -> bool:
    draw, total = _rows(rng)
    champion, any_promoted = draw(rng), False
    for week in range(looks):
        candidate = draw(rng)
        if promoted(candidate, champion, total, policy, week):
            champion, any_promoted = candidate, True
    return any_promoted


def _counted(scenario: str, confidence: float, trials: int, false: int) -> FalsePromotions:
    tail = (1 - BOUND) / 2
    low = float(beta.ppf(tail, false, trials - false + 1)) if false else 0.0
    high = float(beta.ppf(1 - tail, false + 1, trials - false)) if false < trials else 1.0
    return FalsePromotions(scenario, confidence, trials, false, false / trials, low, high)


def power(comparisons: int, policy: Policy, seed: int) -> Iterator[Power]:
    """Better releases, at the level of one of the policy's looks, for each of POWER_ROWS and POWER_GAINS."""
    for rows in POWER_ROWS:
        for gain in POWER_GAINS:
            rng = np.random.default_rng([seed, rows, round(1000 * gain)])
            # Of the rows on which the two differ, (d + gain) / 2 are the candidate's.
            differ = max(DISAGREE, gain)
            shares = [(differ + gain) / 2, (differ - gain) / 2, 1 - differ]
            found = 0
            for trial in range(comparisons):
                kind = rng.choice(3, rows, p=shares)
                common = rng.random(rows) < RIGHT
                ours, theirs = np.where(kind == 2, common, kind == 0), np.where(kind == 2, common, kind == 1)
                found += promoted(value_and_one(ours), value_and_one(theirs), mean, policy, trial)
            yield Power(rows, gain, found / comparisons, mcnemar_power(rows, gain, differ, 1 - policy.look_confidence))


def mcnemar_power(rows: int, gain: float, differ: float, alpha: float) -> float:
    """Of the one-sided test for paired shares. differ: share of the rows on which the two differ."""
    reach = gain * math.sqrt(rows) - float(norm.ppf(1 - alpha)) * math.sqrt(differ)
    spread = differ - gain**2
    return float(norm.cdf(reach / math.sqrt(spread))) if spread > 0 else float(reach > 0)
