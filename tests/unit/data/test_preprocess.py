"""Splits, duplicates, contradictions; and that landing more never moves nor removes a kept row."""

import json
from itertools import combinations
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retune.config import Prompt, Splits
from retune.data.duplicates import jaccard, near_pairs, resolve, shingles
from retune.data.parts import BUCKETS
from retune.data.preprocess import PreprocessResult, preprocess
from retune.data.profile import profile_page
from retune.data.split import split_names
from retune.errors import BadInputError

Row = tuple[int, str, str]
"""Bucket, text, label."""
TRAIN, VALIDATION, TEST = 0, 6500, 9999
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"


SMALL = Prompt.model_validate(
    {
        "name": "tickets",
        "task": "classification",
        "base_model": {"path": "x", "sha256": "0" * 64},
        "source": "landing",
        "template": "{text}",
        "target": "label",
        "labels": {"low": " low", "high": " high"},
        "preprocess": {"near_duplicate": 0.5},
    }
)


def parts(*batches: list[Row]) -> pd.DataFrame:
    rows = [
        {"object": number, "row": row, "bucket": bucket, "text": text, "label": label}
        for number, batch in enumerate(batches)
        for row, (bucket, text, label) in enumerate(batch, 1)
    ]
    return pd.DataFrame(rows, columns=["object", "row", "bucket", "text", "label"])


def splits(result: PreprocessResult) -> dict[str, str]:
    return {row: name for name in ("train", "validation", "test") for row in getattr(result, name)["id"]}


def test_shingles_are_word_triples_without_case() -> None:
    assert shingles("My LAPTOP is broken!") == {"my laptop is", "laptop is broken"}
    assert shingles("Hello, you") == {"hello", "you"}
    assert shingles("?!") == {"?!"}
    assert jaccard(shingles("a b c d"), shingles("a b c e")) == 1 / 3


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join), max_size=25),
    st.sampled_from([0.05, 0.3, 0.5, 0.75, 0.85, 1.0]),
)
@settings(deadline=None)
def test_near_pairs_are_exactly_those_of_the_definition(texts: list[str], threshold: float) -> None:
    expected = [
        (later, earlier)
        for earlier, later in combinations(range(len(texts)), 2)
        if jaccard(shingles(texts[earlier]), shingles(texts[later])) >= threshold
    ]
    found = [(int(a), int(b)) for later, earlier in near_pairs(texts, threshold) for a, b in zip(later, earlier, strict=True)]
    assert found == sorted(expected)


def test_a_salt_deals_the_buckets_anew_in_the_same_shares() -> None:
    buckets = pd.Series(range(BUCKETS))
    shares = {"train": 0.6, "validation": 0.15, "test": 0.25}
    plain, salted, again = (split_names(buckets, Splits(salt=salt)) for salt in ("", "2027", "2027"))
    assert salted.equals(again)
    for names in (plain, salted):
        assert names.value_counts(normalize=True).to_dict() == pytest.approx(shares, abs=1e-4)
    assert (plain == salted).mean() == pytest.approx(sum(share**2 for share in shares.values()), abs=0.02)  # as if independent
    assert plain[[TRAIN, VALIDATION, TEST]].tolist() == ["train", "validation", "test"]


def test_a_bridge_between_splits_leaves_and_one_within_a_split_joins_groups() -> None:
    a, b, bridge = "a b c d e f", "c d e f g h", "a b c d e f g h"  # J(a, bridge) = J(b, bridge) = 4/6; J(a, b) = 2/6
    apart = resolve([a, b, bridge], ["train", "test", "train"], 0.6)
    assert apart.blocker.tolist() == [-1, -1, 1]
    assert apart.group.tolist() == [0, 1, 2]
    together = resolve([a, b, bridge], ["train", "train", "train"], 0.6)
    assert together.blocker.tolist() == [-1, -1, -1]
    assert together.group.tolist() == [0, 0, 0]


def test_a_removed_row_removes_no_other() -> None:
    a, b, c = "a b c d e f", "b c d e f g", "c d e f g h"  # neighbours: 3/5; a and c: 2/6
    assert resolve([a, b, c], ["train", "test", "train"], 0.6).blocker.tolist() == [-1, 0, -1]


def test_the_bucket_decides_the_split(prompt: Prompt) -> None:
    result = preprocess(parts([(5999, "aa", "low"), (6000, "bb", "low"), (7499, "cc", "low"), (7500, "dd", "high")]), prompt)
    assert splits(result) == {"0:1": "train", "0:2": "validation", "0:3": "validation", "0:4": "test"}


def test_of_exact_duplicates_one_stays_with_the_earliest_place_and_the_latest_label(prompt: Prompt) -> None:
    result = preprocess(parts([(TRAIN, "my  order", "low")], [(TEST, "my order ", "high"), (TEST, "other", "low")]), prompt)
    assert result.train.to_dict("records") == [{"id": "0:1", "group": "0:1", "text": "my order", "label": "high"}]
    assert result.test["id"].tolist() == ["1:2"]
    assert result.report["contradictions"] == [{"id": "0:1", "label": "low", "later_id": "1:1", "later_label": "high"}]
    assert (result.report["rows"], result.report["kept"], result.report["duplicates"]) == (3, 2, 1)
    assert result.report["objects"] == [
        {"object": 0, "rows": 1, "kept": 1, "duplicates": 0, "near_duplicates": 0},
        {"object": 1, "rows": 2, "kept": 1, "duplicates": 1, "near_duplicates": 0},
    ]


def test_a_later_near_duplicate_in_another_split_leaves_and_is_listed(prompt: Prompt) -> None:
    result = preprocess(parts([(TRAIN, LONG, "low")], [(TEST, f"{LONG} again", "low"), (TRAIN, f"{LONG} too", "low")]), prompt)
    assert splits(result) == {"0:1": "train", "1:2": "train"}
    assert result.train["group"].tolist() == ["0:1", "0:1"]
    [listed] = result.report["near_duplicate_rows"]
    assert (listed["id"], listed["near_id"], listed["similarity"]) == ("1:1", "0:1", round(14 / 15, 4))


def test_references_of_a_held_out_input_stand_in_one_row_and_every_landed_row_is_counted(make: Any) -> None:
    prompt = make(task="generation", labels={}, target="label", slices=["channel"])
    landed = [(TEST, "mr", "one"), (TEST, "other", "three"), (TEST, "mr ", "two"), (TEST, "mr", "one"), (TRAIN, "third", "four")]
    rows = parts(landed, [(TEST, "mr", "late")]).assign(channel=[*"abcde", "f"])
    result = preprocess(rows, prompt)
    assert result.test.to_dict("records") == [
        {"id": "0:1", "group": "0:1", "text": "mr", "label": "one\ntwo\nlate", "channel": "a"},
        {"id": "0:2", "group": "0:2", "text": "other", "label": "three", "channel": "b"},
    ]
    report = result.report
    assert (report["rows"], report["kept"], report["duplicates"], report["near_duplicates"]) == (6, 5, 1, 0)
    assert {name: (split["rows"], split["inputs"]) for name, split in report["splits"].items()} == {
        "train": (1, 1),
        "validation": (0, 0),
        "test": (4, 2),
    }
    assert "</html>" in profile_page(report, prompt)


def test_several_answers_to_an_input_are_rows_of_their_own_in_training(make: Any) -> None:
    prompt = make(task="generation", labels={}, target="label")
    result = preprocess(parts([(TRAIN, "mr", "one"), (TEST, "mr ", "two"), (TEST, "mr", "one")]), prompt)
    assert result.train[["id", "group", "label"]].values.tolist() == [["0:1", "0:1", "one"], ["0:2", "0:1", "two"]]
    assert result.report["duplicates"] == 1
    assert result.report["contradictions"] == []


def test_token_lengths_are_counted_where_given(prompt: Prompt) -> None:
    result = preprocess(
        parts([(TRAIN, "aa bb", "low"), (TEST, "c", "low")]), prompt, lambda texts: [600 if " " in text else 1 for text in texts]
    )
    assert result.report["longer_than_max_tokens"] == 1
    assert result.report["lengths"]["tokens"]["quantiles"]["1"] == 600
    assert result.report["lengths"]["words"]["quantiles"] == {
        "0": 1,
        "0.05": 1.05,
        "0.25": 1.25,
        "0.5": 1.5,
        "0.75": 1.75,
        "0.95": 1.95,
        "1": 2,
    }
    assert sum(result.report["lengths"]["characters"]["counts"]) == 2
    json.dumps(result.report, allow_nan=False)


def test_only_training_rows_get_noisy_copies(make: Any) -> None:
    prompt = make(preprocess={"augmentation": {"copies": 2, "seed": 5}})
    rows = parts([(TRAIN, "write to <mail> about the order", "low"), (TEST, "something else", "high")])
    result = preprocess(rows, prompt)
    assert result.train["id"].tolist() == ["0:1", "0:1#1", "0:1#2"]
    assert result.train["group"].tolist() == ["0:1"] * 3
    assert all("<mail>" in text for text in result.train["text"])
    assert result.train["text"].nunique() == 3
    assert len(result.test) == 1
    assert result.report["augmented"] == 2
    pd.testing.assert_frame_equal(result.train, preprocess(rows, prompt).train)


@pytest.mark.parametrize("rows", [[], [(TRAIN, "only", "low")]])
def test_few_rows_are_no_error(prompt: Prompt, rows: list[Row]) -> None:
    result = preprocess(parts(rows), prompt)
    assert result.report["kept"] == len(rows)
    assert "</html>" in profile_page(result.report, prompt)


def test_a_missing_column_is_bad_input(prompt: Prompt) -> None:
    with pytest.raises(BadInputError, match="the parts have no column label"):
        preprocess(parts([]).drop(columns="label"), prompt)


WORDS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8).map(" ".join)
BATCH = st.lists(st.tuples(st.sampled_from([TRAIN, VALIDATION, TEST]), WORDS, st.sampled_from(["low", "high"])), max_size=8)


@given(st.lists(BATCH, min_size=2, max_size=4))
@settings(deadline=None, max_examples=25)
def test_landing_more_never_moves_a_kept_row(batches: list[list[Row]]) -> None:
    before: dict[str, str] = {}
    for landed in range(1, len(batches) + 1):
        result = preprocess(parts(*batches[:landed]), SMALL)
        now = splits(result)
        assert before.items() <= now.items()
        before = now
        report = result.report
        for counts in (report, *report["objects"]):
            assert counts["rows"] == counts["kept"] + counts["duplicates"] + counts["near_duplicates"]
        assert report["kept"] == len(now) == sum(split["rows"] for split in report["splits"].values())
        for one, other in combinations([result.train, result.validation, result.test], 2):
            for text in one["text"]:
                assert all(jaccard(shingles(text), shingles(near)) < 0.5 for near in other["text"])
            assert not set(one["group"]) & set(other["group"])


def test_the_profile_page_is_escaped_and_the_same_each_time(make: Any) -> None:
    prompt = make(description="<script>x</script>")
    hostile = f"{LONG} <img>"
    report = preprocess(
        parts([(TRAIN, LONG, "low"), (TRAIN, "<b>", "low"), (TRAIN, "<b> ", "high"), (TEST, hostile, "low")]), prompt
    ).report
    page = profile_page(report, prompt)
    assert page == profile_page(json.loads(json.dumps(report)), prompt)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;img&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert "<td>0:2</td><td>low</td><td>0:3</td><td>high</td>" in page
