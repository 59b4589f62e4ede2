import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_recall_fscore_support, precision_score, recall_score

from retune.config import canonical_json
from retune.errors import BadInputError, ConfigError
from retune.evaluation import metrics
from retune.evaluation.comparison import CLASSIFICATION
from retune.evaluation.metrics import aggregate_metrics, confusion, evaluate, metric_named, per_class, task_metrics
from retune.evaluation.predictions import rows_sha256

# Five rows: low 2 of 3 right (one called medium), medium 1 of 1, high outside of the labels.
TARGET, PREDICTION = [0, 0, 0, 1, 2], [0, 0, 1, 1, -1]
# F1 by hand: low 2*2/(2+3), medium 2*1/(2+1), high 0.
F1 = [4 / 5, 2 / 3, 0.0]


def test_classification_metrics_by_hand(make_frame, labels):
    found = aggregate_metrics(make_frame(TARGET, PREDICTION), labels)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx(sum(F1) / 3)
    assert found["weighted_f1"] == pytest.approx((3 * F1[0] + F1[1] + F1[2]) / 5)
    # Probability of the reference: 0.8 where right, 0.1 in the third row, 0.3 in the last.
    assert found["log_loss"] == pytest.approx(-(3 * math.log(0.8) + math.log(0.1) + math.log(0.3)) / 5)
    assert list(found) == [metric.name for metric in task_metrics("classification")]


def test_per_class_figures_by_hand(make_frame, labels):
    found = per_class(make_frame(TARGET, PREDICTION), labels)
    assert list(found) == labels
    assert found["low"] == pytest.approx({"precision": 1, "recall": 2 / 3, "f1": F1[0], "rows": 3})
    assert found["medium"] == pytest.approx({"precision": 1 / 2, "recall": 1, "f1": F1[1], "rows": 1})
    assert found["high"] == pytest.approx({"precision": 0, "recall": 0, "f1": 0, "rows": 1})


def test_confusion_counts_every_row_and_keeps_strays_apart(make_frame, labels):
    assert confusion(make_frame(TARGET, PREDICTION), labels).tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_missing_prediction_counts_as_wrong(make_frame, labels):
    frame = make_frame([0, 1], [0, 1])
    frame["prediction"] = ["low", None]
    assert aggregate_metrics(frame, labels)["accuracy"] == 0.5


def test_macro_f1_reaches_one_where_a_label_never_occurs(make_frame, labels):
    assert aggregate_metrics(make_frame([0, 1], [0, 1]), labels)["macro_f1"] == 1.0


def test_log_loss_is_scikit_learns_even_where_labels_are_not_sorted(make_frame, labels):
    rng = np.random.default_rng(3)
    target = rng.integers(3, size=200)
    frame = make_frame(target, target)
    chances = rng.dirichlet([0.1, 0.1, 0.1], size=200)
    chances[0] = [0, 0, 1]  # a probability of exactly 0
    frame[[f"p_{label}" for label in labels]] = chances
    expected = log_loss(target, chances, labels=[0, 1, 2])
    assert aggregate_metrics(frame, labels)["log_loss"] == pytest.approx(expected, rel=1e-12)


def test_a_probability_that_is_no_number_makes_log_loss_nan(make_frame, labels):
    frame = make_frame(TARGET, PREDICTION)
    frame.loc[0, "p_high"] = np.nan
    found = aggregate_metrics(frame, labels)
    assert math.isnan(found["log_loss"])
    assert found["accuracy"] == pytest.approx(3 / 5)


def test_evaluate_gives_metrics_by_slice_and_the_hash_of_its_rows(make_frame, make_prompt):
    frame = make_frame(TARGET, PREDICTION, channel=["web", "web", "mail", "mail", None])
    found = evaluate(frame, make_prompt(), "r" * 64, "e" * 64)
    assert (found.release, found.evaluator, found.rows) == ("r" * 64, "e" * 64, 5)
    assert found.test_sha256 == rows_sha256(frame)
    assert found.metrics["accuracy"] == pytest.approx(0.6)
    assert {value: (figures["accuracy"], figures["rows"]) for value, figures in found.slices["channel"].items()} == {
        "(none)": (0.0, 1),
        "mail": (0.5, 2),
        "web": (1.0, 2),
    }
    assert canonical_json(found.to_json())
    assert type(found).from_json(found.to_json()) == found


def test_evaluate_takes_a_generation_prompt(make_prompt, make_texts):
    prompt = make_prompt(task="generation", labels={})
    frame = make_texts(["a", "c"], [["a"], ["b"]]).assign(channel=["web", "mail"], output_nats=1.0, output_tokens=2, relevance=0.5)
    found = evaluate(frame, prompt, "r", "e")
    assert list(found.metrics) == [metric.name for metric in task_metrics("generation")]
    assert (found.metrics["exact_match"], found.per_class) == (0.5, {})
    assert {value: figures["exact_match"] for value, figures in found.slices["channel"].items()} == {"mail": 0.0, "web": 1.0}
    assert found.signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert type(found).from_json(found.to_json()) == found


def test_evaluate_refuses_a_frame_without_a_slice_column(make_frame, make_prompt):
    with pytest.raises(BadInputError, match="missing: channel"):
        evaluate(make_frame(TARGET, PREDICTION), make_prompt(), "r", "e")


def test_metrics_say_which_way_is_better():
    lower = ["log_loss", "calibration_error", "outside_labels"]
    lower += ["perplexity", "perplexity_per_byte", "fluency", "empty_outputs", "truncated_outputs"]
    assert [metric.name for metric in metrics.METRICS.values() if metric.higher_is_better is False] == lower
    with pytest.raises(ConfigError, match=r"metric must be one of accuracy, .*, got 'f1'"):
        metric_named("f1")


SCORES = {"precision": precision_score, "recall": recall_score, "f1": f1_score}


def by_scikit_learn(frame, labels, metric):
    """Averages are over the labels that occur among the references; a prediction outside of the labels is a class of its own."""
    target, said = list(frame["target"]), [label if label in labels else "(other)" for label in frame["prediction"]]
    if metric == "accuracy":
        return accuracy_score(target, said)
    if metric == "log_loss":  # scikit-learn reads the columns in sorted order of the labels
        return log_loss(target, frame[[f"p_{label}" for label in sorted(labels)]].to_numpy(), labels=sorted(labels))
    if metric == "outside_labels":
        return said.count("(other)") / len(said)
    average, _, score = metric.partition("_")
    return SCORES[score](target, said, labels=sorted(set(target)), average=average, zero_division=0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_metrics_equal_scikit_learns_on_any_frame(data):
    """As `evaluate` computes them, and as sums over rows, which the bootstrap draws."""
    labels = ["low", "medium", "high", "none"]
    rows = data.draw(st.lists(st.tuples(st.sampled_from(labels), st.sampled_from([*labels, "urgent", None])), min_size=1, max_size=40))
    chances = np.random.default_rng(data.draw(st.integers(0, 99))).dirichlet(np.ones(len(labels)), size=len(rows))
    frame = pd.DataFrame(
        {
            "id": range(len(rows)),
            "group": range(len(rows)),
            "target": [target for target, _ in rows],
            "prediction": [said for _, said in rows],
            **{f"p_{label}": chances[:, k] for k, label in enumerate(labels)},
        }
    )
    whole = aggregate_metrics(frame, labels)
    for metric, (sums, total) in CLASSIFICATION.items():
        if metric == "calibration_error":  # scikit-learn has none
            continue
        expected = by_scikit_learn(frame, labels, metric)
        assert whole[metric] == pytest.approx(expected, abs=1e-12), metric
        assert total(sums(frame, labels).sum(axis=0, keepdims=True)).item() == pytest.approx(expected, abs=1e-12), metric
    names = [label if label in labels else "(other)" for label in frame["prediction"]]
    expected_classes = np.array(precision_recall_fscore_support(frame["target"], names, labels=labels, zero_division=0)).T
    assert np.array([list(of_label.values()) for of_label in per_class(frame, labels).values()]) == pytest.approx(expected_classes)
