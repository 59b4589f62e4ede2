import pytest

from retune.errors import BadInputError
from retune.evaluation.sample import Ratings, Sample, read_ratings, summary, unblind

RELEASES = {"candidate": "c" * 64, "champion": "d" * 64}
IDS = [f"1:{row}" for row in range(100)]
SAMPLE = Sample("p", "e" * 32, *RELEASES.values(), (("1:1", "candidate"), ("1:2", "champion"), ("1:3", "champion")))


def given(*ratings: dict, **fields) -> str:
    import json

    return json.dumps({"format": 1, "prompt": "p", "run": SAMPLE.run, **RELEASES, "ratings": list(ratings), **fields})


def rated(*ratings: dict, by: str = "anna") -> Ratings:
    return unblind(read_ratings(given(*ratings), "file"), SAMPLE, by, "2026-05-04T10:00:00Z")


def test_the_same_releases_get_the_same_rows_and_others_get_others() -> None:
    one = Sample.draw("p", "e" * 32, RELEASES, IDS)
    assert one == Sample.draw("p", "e" * 32, RELEASES, IDS)
    assert len({row for row, _ in one.rows}) == 20
    assert {role for _, role in one.rows} == {"candidate", "champion"}
    assert one.rows != Sample.draw("p", "e" * 32, {**RELEASES, "champion": "f" * 64}, IDS).rows
    assert one.rows != Sample.draw("p", "e" * 32, RELEASES, IDS, seed=1).rows
    assert len(Sample.draw("p", "e" * 32, RELEASES, IDS[:7]).rows) == 7
    assert Sample.from_json(one.to_json()) == one


def test_grades_go_to_the_release_whose_output_it_was() -> None:
    found = rated({"id": "1:1", "a": "good", "b": "bad"}, {"id": "1:2", "a": "good", "b": "acceptable", "comment": "short"})
    assert [(row.id, row.candidate, row.champion, row.comment) for row in found.ratings] == [
        ("1:1", "good", "bad", ""),
        ("1:2", "acceptable", "good", "short"),
    ]


def test_the_summary_by_hand() -> None:
    """anna: the candidate better, then worse; ben: better, then alike. Good of the candidate: 1:1 twice, 1:3; of the champion: 1:2, 1:3."""
    anna = rated({"id": "1:1", "a": "good", "b": "bad"}, {"id": "1:2", "a": "good", "b": "acceptable"})
    ben = rated({"id": "1:1", "a": "good", "b": "acceptable"}, {"id": "1:3", "a": "good", "b": "good"}, by="ben")
    assert summary([anna, ben]) == {
        "rated_good": 0.75,
        "champion_rated_good": 0.5,
        "rated_preference": 0.25,
        "rated_rows": 4,
        "rated_people": 2,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", "no JSON"),
        (given(), "ratings"),
        (given({"id": "1:1", "a": "good", "b": "great"}), "ratings.0.b"),
        (given({"id": "1:1", "a": "good"}), "ratings.0.b"),
        (given({"id": "1:1", "a": "good", "b": "bad"}, format=2), "format"),
        (given({"id": "1:1", "a": "good", "b": "bad"}, run="../../x"), "run"),
        (given({"id": "1:1", "a": "good", "b": "bad"}, extra=1), "extra"),
    ],
)
def test_a_file_that_no_report_gave_out_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        read_ratings(text, "file")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (given({"id": "1:9", "a": "good", "b": "bad"}), "'1:9' is not in the run's sample"),
        (given({"id": "1:1", "a": "good", "b": "bad"}, {"id": "1:1", "a": "bad", "b": "bad"}), "'1:1' is rated twice"),
        (given({"id": "1:1", "a": "good", "b": "bad"}, prompt="q"), "prompt must be 'p'"),
        (given({"id": "1:1", "a": "good", "b": "bad"}, run="f" * 32), "run must be"),
        (given({"id": "1:1", "a": "good", "b": "bad"}, champion="f" * 64), "champion must be"),
    ],
)
def test_a_file_of_another_run_or_sample_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        unblind(read_ratings(text, "file"), SAMPLE, "anna", "2026-05-04T10:00:00Z")
