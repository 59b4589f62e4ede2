import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, log_loss

from retune.errors import BadInputError, ConfigError
from retune.evaluation import comparison
from retune.evaluation.comparison import compare_groups, paired_bootstrap, swap_test
from retune.evaluation.sums import mean, value_and_one


@pytest.fixture
def two_sides(make_frame):
    """Two releases, the candidate a little better, over groups of 1 to 4 rows."""

    def build(rows=300, seed=7, right=(0.85, 0.75), grouped=True):
        rng = np.random.default_rng(seed)
        target = rng.choice(3, rows, p=[0.6, 0.3, 0.1])
        groups = np.sort(rng.integers(rows // 2, size=rows)) if grouped else None
        frames = []
        for share in right:
            other = (target + rng.integers(1, 3, rows)) % 3
            stray = np.where(rng.random(rows) < 0.1, -1, other)
            frames.append(make_frame(target, np.where(rng.random(rows) < share, target, stray), groups))
        return frames

    return build


def plain_values(candidate, champion, value, resamples, seed):
    """Gains by drawing whole groups, one resample after another, with the same random draws."""
    codes, names = pd.factorize(candidate["group"])
    members = [np.flatnonzero(codes == code) for code in range(len(names))]
    rng = np.random.default_rng(seed)
    gains = []
    for _ in range(resamples):
        rows = np.concatenate([members[group] for group in rng.integers(len(names), size=len(names))])
        gains.append(value(candidate.iloc[rows]) - value(champion.iloc[rows]))
    return np.array(gains)


def plain_f1(average):
    def value(frame):
        present = [label for label in ("low", "medium", "high") if label in set(frame["target"])]
        return f1_score(frame["target"], frame["prediction"], labels=present, average=average, zero_division=0)

    return value


def minus_log_loss(frame):
    # scikit-learn reads the columns in sorted order of the labels.
    return -log_loss(frame["target"], frame[["p_high", "p_low", "p_medium"]], labels=["high", "low", "medium"])


@pytest.mark.parametrize(
    ("metric", "value", "tolerance"),
    [
        ("accuracy", lambda frame: accuracy_score(frame["target"], frame["prediction"]), 0),
        ("macro_f1", plain_f1("macro"), 0),
        ("weighted_f1", plain_f1("weighted"), 0),
        ("log_loss", minus_log_loss, 1e-12),
    ],
)
def test_interval_is_that_of_a_plain_recomputation_with_scikit_learn(two_sides, labels, monkeypatch, metric, value, tolerance):
    monkeypatch.setattr(comparison, "CHUNK_CELLS", 5000)  # several chunks, the last one partial
    monkeypatch.setattr(comparison, "FEW", 1000)  # each group by itself, as in the plain recomputation
    candidate, champion = two_sides()
    found = paired_bootstrap(candidate, champion, metric, labels, 0.9, 250, seed=5)
    gains = np.sort(plain_values(candidate, champion, value, 250, seed=5))
    # Order statistics around the 10 % and 90 % points of 250 values, outwards: positions 24.9 and 224.1.
    assert found.low == pytest.approx(gains[24], abs=tolerance, rel=0)
    assert found.high == pytest.approx(gains[225], abs=tolerance, rel=0)
    assert found.gain == pytest.approx(value(candidate) - value(champion), abs=1e-12, rel=0)
    assert (found.rows, found.resamples, found.confidence, found.metric) == (300, 250, 0.9, metric)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "weighted_f1"])
def test_drawing_groups_that_are_alike_together_changes_chance_alone(two_sides, labels, monkeypatch, metric):
    candidate, champion = two_sides(rows=600, grouped=False)
    together = paired_bootstrap(candidate, champion, metric, labels, 0.9, 20_000, seed=5)
    monkeypatch.setattr(comparison, "FEW", 10_000)
    by_itself = paired_bootstrap(candidate, champion, metric, labels, 0.9, 20_000, seed=5)
    width = by_itself.high - by_itself.low
    assert (together.low, together.high) == pytest.approx((by_itself.low, by_itself.high), abs=0.03 * width)
    assert together != by_itself  # other draws


def test_a_small_case_by_hand(make_frame, labels):
    """40 of 100 rows differ, all for the candidate: the gain of a resample is the share of those 40, mean 0.4, deviation 0.049."""
    target = [0] * 100
    candidate, champion = make_frame(target, target), make_frame(target, [1] * 40 + [0] * 60)
    found = paired_bootstrap(candidate, champion, "accuracy", labels, 0.95, 4000, seed=1)
    assert (found.candidate, found.champion, found.gain) == (1.0, 0.6, 0.4)
    deviation = (0.4 * 0.6 / 100) ** 0.5
    assert found.low == pytest.approx(0.4 - 1.645 * deviation, abs=0.01)
    assert found.high == pytest.approx(0.4 + 1.645 * deviation, abs=0.01)


def test_a_lower_log_loss_is_a_gain(make_frame, labels):
    target = [0, 1, 2] * 10
    worse = make_frame(target, target)
    better = worse.copy()
    for row, code in enumerate(target):
        better.loc[row, [f"p_{label}" for label in labels]] = [0.9 if k == code else 0.05 for k in range(3)]
    found = paired_bootstrap(better, worse, "log_loss", labels, 0.95, 200, seed=1)
    assert found.gain == pytest.approx(np.log(0.9) - np.log(0.8))
    assert found.candidate < found.champion
    assert found.low == pytest.approx(found.gain)  # every row gains the same


def test_exact_match_is_compared(make_texts):
    frame = make_texts(["yes"] * 20, [["yes"]] * 20)
    found = paired_bootstrap(frame, frame.assign(prediction="no"), "exact_match", [], 0.95, 200, seed=1)
    assert (found.gain, found.low, found.high) == (1.0, 1.0, 1.0)


def test_swapping_the_sides_mirrors_the_interval(two_sides, labels):
    candidate, champion = two_sides()
    there = paired_bootstrap(candidate, champion, "macro_f1", labels, 0.95, 500, seed=2)
    back = paired_bootstrap(champion, candidate, "macro_f1", labels, 0.95, 500, seed=2)
    assert (back.gain, back.low, back.high) == pytest.approx((-there.gain, -there.high, -there.low))


def test_same_seed_same_interval_whatever_the_chunks(two_sides, labels, monkeypatch):
    candidate, champion = two_sides()
    whole = paired_bootstrap(candidate, champion, "macro_f1", labels, 0.95, 500, seed=2)
    monkeypatch.setattr(comparison, "CHUNK_CELLS", 1)
    assert paired_bootstrap(candidate, champion, "macro_f1", labels, 0.95, 500, seed=2) == whole
    assert paired_bootstrap(candidate, champion, "macro_f1", labels, 0.95, 500, seed=3) != whole


def test_duplicates_in_a_group_add_no_evidence(two_sides, labels):
    """Every row copied five times into one group: the interval is exactly that of the rows without copies."""
    once = [frame.assign(group=frame["id"]) for frame in two_sides(grouped=False)]
    copied = [pd.concat([frame] * 5).assign(id=range(5 * len(frame))) for frame in once]
    plain = paired_bootstrap(*once, "macro_f1", labels, 0.95, 500, seed=2)
    grouped = paired_bootstrap(*copied, "macro_f1", labels, 0.95, 500, seed=2)
    as_rows = paired_bootstrap(*(frame.assign(group=frame["id"]) for frame in copied), "macro_f1", labels, 0.95, 500, seed=2)
    assert (grouped.low, grouped.high) == pytest.approx((plain.low, plain.high), abs=1e-12)
    assert as_rows.high - as_rows.low < 0.6 * (plain.high - plain.low)


@pytest.mark.parametrize(("groups", "above_zero"), [(4, False), (5, True)])
def test_fewer_groups_than_a_sign_test_needs_tell_nothing(make_frame, labels, groups, above_zero):
    """2^-4 = 0.0625 > 0.05 >= 2^-5. Each group holds 10 rows on which only the candidate is right."""
    target = [0] * 100
    better, worse = make_frame(target, target), make_frame(target, [1] * 10 * groups + [0] * (100 - 10 * groups))
    codes = np.arange(100) // 10
    better, worse = better.assign(group=codes), worse.assign(group=codes)
    found = paired_bootstrap(better, worse, "accuracy", labels, 0.95, 1000, seed=1)
    assert (found.low > 0) == above_zero
    mirrored = paired_bootstrap(worse, better, "accuracy", labels, 0.95, 1000, seed=1)
    assert (mirrored.high < 0) == above_zero


@pytest.mark.parametrize(("right", "wrong"), [(11, 1), (14, 2), (30, 10), (25, 20)])
def test_the_swap_test_is_mcnemars_exact_test_of_accuracy(right, wrong):
    """Of the groups on which only one side is right, the candidate has `right`."""
    ours = value_and_one(np.array([1] * right + [0] * wrong + [1] * 50, dtype=bool))
    theirs = value_and_one(np.array([0] * right + [1] * wrong + [1] * 50, dtype=bool))
    better, worse = swap_test(ours, theirs, mean, 1, 1 - 0.05 / 52, seed=3)
    assert better == pytest.approx(binomtest(right, right + wrong, alternative="greater").pvalue, rel=0.45)
    assert worse == pytest.approx(binomtest(right, right + wrong, alternative="less").pvalue, rel=0.1)


def test_far_out_the_swap_test_holds_a_gain_that_the_interval_alone_would_let_through(make_frame, labels):
    """12 of 13 against 1 of 13: p = 0.0017, more than the share of a look in 52, while the percentile interval lies above zero."""
    target = [0] * 100
    better, worse = make_frame(target, [1] + [0] * 99), make_frame(target, [0] + [1] * 12 + [0] * 87)
    level = 1 - 0.05 / 52
    found = paired_bootstrap(better, worse, "accuracy", labels, level, 2000, seed=1)
    sides = [value_and_one(side["prediction"].to_numpy() == "low") for side in (better, worse)]
    assert compare_groups(*sides, mean, 1, level, found.resamples, seed=1)[0] > 0
    assert found.low == 0
    assert found.p_better > 0.05 / 52
    assert found.resamples == round(20 * 52 / 0.05)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_identical_predictions_have_no_gain_at_all(data):
    rows = data.draw(st.integers(1, 30))
    labels = ["a", "b"]
    frame = pd.DataFrame(
        {
            "id": range(rows),
            "group": data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows)),
            "target": data.draw(st.lists(st.sampled_from(labels), min_size=rows, max_size=rows)),
            "prediction": data.draw(st.lists(st.sampled_from([*labels, "c", None]), min_size=rows, max_size=rows)),
            "p_a": 0.25,
            "p_b": 0.75,
        }
    )
    metric = data.draw(st.sampled_from(["accuracy", "macro_f1", "weighted_f1", "log_loss"]))
    found = paired_bootstrap(frame, frame.copy(), metric, labels, 0.95, 100, seed=0)
    assert (found.gain, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize(("metric", "rows", "agreeing"), [("accuracy", 100, 0.9), ("macro_f1", 200, 0.0)])
def test_two_equally_good_releases_seldom_differ_measurably(make_frame, labels, metric, rows, agreeing):
    """300 simulated pairs: each bound misses at most its nominal 5 %, with four standard errors (1.26 % each) of room above."""
    rng = np.random.default_rng(11)
    better = worse = 0
    for trial in range(300):
        target = rng.choice(3, rows, p=[0.6, 0.3, 0.1])
        same = rng.random(rows) < agreeing
        common = rng.random(rows) < 0.8
        other = (target + rng.integers(1, 3, rows)) % 3
        sides = [make_frame(target, np.where(np.where(same, common, rng.random(rows) < 0.8), target, other)) for _ in range(2)]
        found = paired_bootstrap(*sides, metric, labels, 0.95, 300, seed=trial)
        better, worse = better + (found.low > 0), worse + (found.high < 0)
    assert better / 300 < 0.05 + 4 * 0.0126
    assert worse / 300 < 0.05 + 4 * 0.0126


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda frame: frame.iloc[:-1], "same test rows, got 299 and 300 rows"),
        (
            lambda frame: frame.assign(id=[f"other-{n}" for n in range(300)]),
            "id differs in 300 rows, first in row 0: 'other-0' and 'row-0'",
        ),
        (lambda frame: frame.iloc[::-1], "same order: id differs in 300 rows"),
        (lambda frame: frame.assign(target="low"), "target differs"),
        (lambda frame: frame.assign(group="one"), "group differs"),
        (lambda frame: frame.assign(id="row-0"), "id must be unique"),
        (lambda frame: frame.drop(columns="p_low"), "missing: p_low"),
    ],
)
def test_frames_over_other_rows_are_refused(two_sides, labels, change, text):
    candidate, champion = two_sides()
    with pytest.raises(BadInputError, match=text):
        paired_bootstrap(change(candidate), champion, "accuracy", labels, 0.95, 100, seed=1)


def test_what_cannot_be_compared_is_refused(two_sides, labels):
    candidate, champion = two_sides()
    broken = champion.assign(p_low=np.nan)
    with pytest.raises(BadInputError, match="log_loss must be a finite number to be compared, got nan for the champion"):
        paired_bootstrap(candidate, broken, "log_loss", labels, 0.95, 100, seed=1)
    with pytest.raises(ConfigError, match="outside_labels for task: classification, got 'exact_match'"):
        paired_bootstrap(candidate, champion, "exact_match", labels, 0.95, 100, seed=1)
    with pytest.raises(ConfigError, match=r"metric must be one of rougeL, .* for task: generation, got 'accuracy'"):
        paired_bootstrap(candidate, champion, "accuracy", [], 0.95, 100, seed=1)
    with pytest.raises(ConfigError, match="metric must be one of"):
        paired_bootstrap(candidate, champion, "rouge", labels, 0.95, 100, seed=1)
    with pytest.raises(ConfigError, match=r"confidence must be > 0.5 and < 1 and resamples >= 1, got 1.5 and 100"):
        paired_bootstrap(candidate, champion, "accuracy", labels, 1.5, 100, seed=1)


def test_two_thousand_resamples_of_five_thousand_rows_take_less_than_two_seconds(two_sides, labels):
    candidate, champion = two_sides(rows=5000, grouped=False)
    start = time.process_time()
    paired_bootstrap(candidate, champion, "macro_f1", labels, 0.95, 2000, seed=1)
    assert time.process_time() - start < 4  # processor time of both cores; 0.7 s of wall time on an idle machine
