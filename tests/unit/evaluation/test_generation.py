import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from retune.evaluation import comparison
from retune.evaluation.comparison import paired_bootstrap
from retune.evaluation.generation import GENERATION, exact_matches, signatures
from retune.evaluation.metrics import aggregate_metrics

CORPUS = {"bleu": BLEU, "chrf": CHRF}
WORDS = ["the", "router", "is", "on", "fire,", "again!", "Köln", "5 €"]
E2E = Path(os.environ.get("RETUNE_SHARED_DATA", Path(__file__).parents[4] / "shared/data")) / "e2e_nlg/devel-fixed.no-ol.csv"


def by_library(frame: pd.DataFrame, metric: str) -> float:
    """sacreBLEU's own corpus score."""
    references = [target.split("\n") for target in frame["target"]]
    most = max(map(len, references))
    padded = [[of_row[place] if place < len(of_row) else None for of_row in references] for place in range(most)]
    return CORPUS[metric]().corpus_score([said or "" for said in frame["prediction"]], padded).score


def aggregate(frame: pd.DataFrame, metric: str) -> float:
    rows, total = GENERATION[metric]
    return total(rows(frame).sum(axis=0, keepdims=True)).item()


@pytest.fixture
def texts(make_texts):
    """60 rows of one to three references, in groups of one to four; `share` of the words of a reference are kept."""

    def build(share: float, seed: int = 3) -> pd.DataFrame:
        rng = np.random.default_rng(0)
        references = [[" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(rng.integers(1, 4))] for _ in range(60)]
        noise = np.random.default_rng(seed)
        said = [" ".join(word if noise.random() < share else "x" for word in of_row[0].split()) for of_row in references]
        frame = make_texts(said, references, np.sort(rng.integers(30, size=60)))
        return frame.assign(reference_nats=frame["reference_nats"] * (2 - share))

    return build


def test_an_exact_match_is_one_with_any_reference_white_space_around_it_aside(make_texts):
    references = [["a b", "c"], ["a b", "c"], ["a b"], ["a b"], ["x"]]
    assert exact_matches(make_texts([" a b\n", "c", "a  b", None, "X"], references)).tolist() == [True, True, False, False, False]


def test_perplexity_is_over_all_tokens_of_all_references(make_texts):
    frame = make_texts(["a", "b"], [["a", "b"], ["c"]]).assign(reference_nats=[6.0, 1.0], reference_tokens=[4, 3])
    assert aggregate_metrics(frame, [])["perplexity"] == pytest.approx(math.exp(7 / 7))


def test_empty_and_missing_outputs_are_counted(make_texts):
    found = aggregate_metrics(make_texts(["three short words", " ", None, "one"], [["a"]] * 4), [])
    assert (found["empty_outputs"], found["output_words"]) == (0.5, 1.0)


@pytest.mark.parametrize("metric", CORPUS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_bleu_and_chrf_equal_the_library(metric, data):
    line = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join) | st.text(
        st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=8
    )
    rows = data.draw(st.lists(st.tuples(line, st.lists(line, min_size=1, max_size=3)), min_size=1, max_size=5))
    frame = pd.DataFrame({"prediction": [said for said, _ in rows], "target": ["\n".join(references) for _, references in rows]})
    assert aggregate(frame, metric) == pytest.approx(by_library(frame, metric), abs=1e-9)


def test_signatures_say_how_many_references_there_were(make_texts):
    found = signatures(make_texts(["a", "b"], [["a", "b"], ["c", "d"]]))
    assert found["bleu"].startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert found["chrf"].startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize("metric", CORPUS)
def test_every_group_drawn_once_is_the_library_s_corpus_score(texts, monkeypatch, metric):
    candidate, champion = texts(0.9), texts(0.5)
    monkeypatch.setattr(comparison, "_draws", lambda alike, resamples, seed: [np.ones((resamples, len(alike)))])
    found = paired_bootstrap(candidate, champion, metric, [], 0.95, 100, seed=0)
    expected = by_library(candidate, metric) - by_library(champion, metric)
    assert (found.gain, found.low, found.high) == pytest.approx((expected, expected, expected), abs=1e-9)


@pytest.mark.parametrize("metric", [*CORPUS, "rougeL", "perplexity"])
def test_each_resample_is_scored_as_a_corpus_of_its_own(texts, metric, monkeypatch):
    """Interval by drawing whole groups of rows and scoring them anew, with the same random draws."""
    candidate, champion = texts(0.9), texts(0.7)
    monkeypatch.setattr(comparison, "BEYOND", 4)  # 40 draws will do
    found = paired_bootstrap(candidate, champion, metric, [], 0.9, 40, seed=5)
    codes, names = pd.factorize(candidate["group"])
    rng = np.random.default_rng(5)
    gains = []
    for _ in range(40):
        rows = np.concatenate([np.flatnonzero(codes == group) for group in rng.integers(len(names), size=len(names))])
        score = by_library if metric in CORPUS else aggregate
        gains.append(score(candidate.iloc[rows], metric) - score(champion.iloc[rows], metric))
    gains = np.sort(np.array(gains) * (-1 if metric == "perplexity" else 1))
    assert found.low > 0
    # Order statistics around the 10 % and 90 % points of 40 values, outwards: positions 3.9 and 35.1.
    assert (found.low, found.high) == pytest.approx((gains[3], gains[36]), abs=1e-9)


def test_bleu_by_hand(make_texts):
    """Row 1: 6 words, of which 5 match (`the` twice), 3 of 5 pairs, 1 of 4 triples (`on the mat`), 0 of 3 runs of four.

    Alone: the order without a match counts 1/2, so 1/2 of 3: (5/6 * 3/5 * 1/4 * 1/6) = 1/48. The lengths are equal: no penalty.
    Row 2: all 4 words, 3 pairs, 2 triples and 1 run of four match; of its references the one of 5 words is closest in length.
    Together: 9/10, 6/8, 3/6, 1/4, and 10 words where the references have 11.
    """
    first, second = (["the cat sat on the mat"], [["the cat is on the mat"]]), (["a b c d"], [["a b c d e", "x"]])
    assert aggregate(make_texts(*first), "bleu") == pytest.approx(100 * (1 / 48) ** (1 / 4), abs=1e-9)
    together = aggregate(make_texts(*(one + other for one, other in zip(first, second, strict=True))), "bleu")
    assert together == pytest.approx(100 * math.exp(1 - 11 / 10) * (9 / 10 * 6 / 8 * 3 / 6 * 1 / 4) ** (1 / 4), abs=1e-9)


def test_chrf_by_hand(make_texts):
    """Letters and runs of them, the mean over the orders that both sides have, recall weighing twice: 5 P R / (4 P + R).

    Row 1, `ab` for `abd`: letters 2 of 2 and of 3, pairs 1 of 1 and of 2, no triple on one side. P = 1, R = (2/3 + 1/2) / 2 = 7/12.
    Row 2, `abc` for `abd` rather than `xyz`: letters 2 of 3, pairs 1 of 2, triples 0 of 1, on both sides.
    Together: 4 of 5 and of 6, 2 of 3 and of 4, 0 of 1 and of 2. P = (4/5 + 2/3) / 3 = 22/45, R = (2/3 + 1/2) / 3 = 7/18.
    """
    assert aggregate(make_texts(["ab"], [["abd"]]), "chrf") == pytest.approx(100 * 7 / 11, abs=1e-9)
    precision, recall = 22 / 45, 7 / 18
    together = aggregate(make_texts(["ab", "abc"], [["abd"], ["xyz", "abd"]]), "chrf")
    assert together == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall), abs=1e-9)


def test_rouge_of_several_rows_by_hand(make_texts):
    """Row 1, `a b c`: for `a b` 2 words, 1 pair and a subsequence of 2, F 4/5, 2/3, 4/5; for `c b a x` 3, 0 and 1, F 6/7, 0, 2/7.

    Row 2: nothing.
    """
    found = aggregate_metrics(make_texts(["a b c", "x"], [["a b", "c b a x"], ["y"]]), [])
    assert (found["rouge1"], found["rouge2"], found["rougeL"]) == pytest.approx((6 / 7 / 2, 2 / 3 / 2, 4 / 5 / 2))


@pytest.fixture(scope="module")
def real() -> pd.DataFrame:
    """500 inputs with several references each: answered with another one, whole, without a third of its words or in capitals, with one
    of the references itself, or not at all."""
    if not E2E.is_file():
        pytest.skip(f"real text is absent: E2E NLG is not at {E2E} (RETUNE_SHARED_DATA names another place)")
    references = pd.read_csv(E2E).groupby("mr", sort=False)["ref"].agg(list)
    several = [of_input for of_input in references if len(of_input) > 2][:500]
    assert len(several) == 500
    answers = (str, lambda text: " ".join(word for n, word in enumerate(text.split()) if n % 3), str.upper, lambda text: "")
    said = [of[0] if row % 10 == 9 else answers[row % 4](of[-1]) for row, of in enumerate(several)]
    return pd.DataFrame({"prediction": said, "target": ["\n".join(of[:-1]) for of in several]})


@pytest.mark.parametrize("metric", CORPUS)
def test_bleu_and_chrf_equal_sacrebleu_on_real_text(real, metric):
    assert 10 < aggregate(real, metric) < 90
    assert aggregate(real, metric) == pytest.approx(by_library(real, metric), abs=1e-9)


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
def test_each_row_s_rouge_equals_rouge_score_on_real_text(real, metric):
    scorer = RougeScorer([metric])
    expected = [
        scorer.score_multi(target.split("\n"), said)[metric].fmeasure
        for said, target in zip(real["prediction"], real["target"], strict=True)
    ]
    assert len(set(expected)) > 100
    assert GENERATION[metric][0](real)[:, 0] == pytest.approx(expected, abs=1e-12)
    assert aggregate(real, metric) == pytest.approx(np.mean(expected), abs=1e-12)


def test_exact_matches_on_real_text_are_the_answers_among_the_references(real):
    expected = [said in target.split("\n") for said, target in zip(real["prediction"], real["target"], strict=True)]
    assert 50 <= sum(expected) < 200
    assert exact_matches(real).tolist() == expected
    assert aggregate(real, "exact_match") == sum(expected) / 500
