import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from retune.evaluation.rouge import ROUGE, longest_common_subsequence, rouge

SCORER = RougeScorer(list(ROUGE))
TEXTS = st.lists(st.sampled_from(["the", "cat", "Cat", "sat", "on-mat", "5", "Grüße", "猫", "!", ""]), max_size=12).map(" ".join) | st.text(
    max_size=20
)


def test_by_hand():
    """police killed the gunman / police kill the gunman: 3 of 4 words, 1 of 3 pairs, a common subsequence of 3."""
    assert rouge("Police killed the gunman.", ["police kill the gunman"]) == pytest.approx((3 / 4, 1 / 3, 3 / 4))


def test_the_best_reference_counts_for_each_figure_by_itself():
    prediction, words, order = "a b c d", "d c b a", "b c x y"
    assert rouge(prediction, [words, order]) == pytest.approx((1.0, 1 / 3, 1 / 2))


@pytest.mark.parametrize("empty", ["", "?!", "猫"])
def test_a_text_without_words_scores_nothing(empty):
    assert rouge(empty, ["a b"]) == rouge("a b", [empty]) == rouge(empty, [empty]) == (0, 0, 0)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_equals_rouge_score(prediction, references):
    expected = SCORER.score_multi(references, prediction)
    assert rouge(prediction, references) == pytest.approx(tuple(expected[name].fmeasure for name in ROUGE), abs=1e-12)


@given(st.lists(st.sampled_from("abc"), max_size=70), st.lists(st.sampled_from("abc"), max_size=70))
def test_longest_common_subsequence_is_that_of_the_table(one, other):
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for column, its in enumerate(other, 1):
            row.append(before[column - 1] + 1 if its == word else max(before[column], row[-1]))
    assert longest_common_subsequence(one, other) == row[-1]
