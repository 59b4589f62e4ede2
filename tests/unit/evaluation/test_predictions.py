import hashlib

import numpy as np
import pandas as pd
import pytest

from retune.errors import BadInputError
from retune.evaluation.predictions import check_predictions, label_codes, probabilities, rows_sha256, slice_values


def test_all_missing_columns_are_named_at_once(make_frame, labels):
    frame = make_frame([0], [0]).drop(columns=["group", "p_high"])
    with pytest.raises(BadInputError, match="missing: group, channel, p_high"):
        check_predictions(frame, labels, ["channel"])


def test_a_frame_of_texts_holds_what_perplexity_is_made_of(make_texts):
    frame = make_texts(["a"], [["a"]])
    check_predictions(frame, [])
    with pytest.raises(BadInputError, match="missing: reference_nats, reference_tokens"):
        check_predictions(frame.drop(columns=["reference_nats", "reference_tokens"]), [])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda frame: frame.iloc[:0], "at least 1 row"),
        (lambda frame: frame.assign(id="same"), "id must be unique in the predictions, got 1 repeated, such as 'same'"),
        (lambda frame: frame.assign(target=["low", None]), "target must be set in every row of the predictions, got 1 without"),
        (lambda frame: frame.assign(group=[None, "g"]), "group must be set"),
        (lambda frame: frame.assign(target=["low", "urgent"]), "target must be one of low, medium, high, got 'urgent'"),
    ],
)
def test_a_frame_that_is_no_predictions_frame_is_refused(make_frame, labels, change, text):
    with pytest.raises(BadInputError, match=text):
        check_predictions(change(make_frame([0, 1], [0, 1])), labels)


def test_anything_outside_of_the_labels_has_code_minus_one(labels):
    values = pd.Series(["high", "low", "urgent", None, np.nan, "Low"], dtype=object)
    assert label_codes(values, labels).tolist() == [2, 0, -1, -1, -1, -1]


def test_probabilities_are_scaled_and_unknown_ones_stay_unknown(make_frame, labels):
    frame = make_frame([0, 1], [0, 1])
    frame.loc[0, ["p_low", "p_medium", "p_high"]] = [0.5, 0.25, 0.2505]
    frame.loc[1, "p_high"] = np.inf
    first, second = probabilities(frame, labels)
    assert first == pytest.approx([0.5 / 1.0005, 0.25 / 1.0005, 0.2505 / 1.0005])
    assert np.isnan(second).all()


@pytest.mark.parametrize("row", [[0.5, 0.4, 0.0], [1.2, -0.1, -0.1]])
def test_scores_that_are_no_probabilities_are_refused(make_frame, labels, row):
    frame = make_frame([0, 1], [0, 1])
    frame.loc[1, ["p_low", "p_medium", "p_high"]] = row
    with pytest.raises(BadInputError, match=r"add up to 1, got low: .* in row 'row-1'"):
        probabilities(frame, labels)


def test_rows_hash_is_that_of_the_ordered_ids_and_references(make_frame):
    frame = make_frame([0, 2], [1, 1])
    assert rows_sha256(frame) == hashlib.sha256(b'["row-0", "low"]\n["row-1", "high"]\n').hexdigest()
    assert rows_sha256(frame.assign(prediction="low")) == rows_sha256(frame)
    assert rows_sha256(frame.iloc[::-1]) != rows_sha256(frame)
    assert rows_sha256(frame.assign(target="low")) != rows_sha256(frame)


def test_missing_slice_values_are_shown():
    frame = pd.DataFrame({"channel": pd.Categorical(["web", None]), "level": [1, 2]})
    assert slice_values(frame, "channel").tolist() == ["web", "(none)"]
    assert slice_values(frame, "level").tolist() == ["1", "2"]
