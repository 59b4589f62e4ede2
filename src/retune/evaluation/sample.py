"""Some test rows for a person to read and rate without knowing whose output is whose, and what the ratings say.

The page shows each row's two outputs as A and B, in an order drawn from the run's seed, and gives the ratings out as a file
(`RatingsFile`). The drawn sample stands beside the run, so that `retune rate` can tell that a file belongs to it, and whose A was.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError

from retune.config import sha256_json
from retune.errors import BadInputError
from retune.evaluation.roles import CANDIDATE, CHAMPION
from retune.policy import Section

__all__ = ["GRADES", "SAMPLE_ROWS", "Grade", "RatedRow", "Ratings", "RatingsFile", "Sample", "read_ratings", "summary", "unblind"]

SAMPLE_ROWS = 20
Grade = Literal["good", "acceptable", "bad"]
GRADES: tuple[Grade, ...] = get_args(Grade)
"""Best first."""
RUN_ID = r"^[0-9a-f]{32}$"
RELEASE = r"^[0-9a-f]{64}$"


@dataclass(frozen=True)
class Sample:
    """Rows that a DAG run's page asks a person to rate."""

    prompt: str
    run: str
    """Id of the DAG run's MLflow run."""
    candidate: str
    """Release id."""
    champion: str
    rows: tuple[tuple[str, str], ...]
    """Row id and the role whose output is A there, in the order of the page."""

    @classmethod
    def draw(cls, prompt: str, run: str, releases: Mapping[str, str], ids: Sequence[str], seed: int = 0, rows: int = SAMPLE_ROWS) -> Self:
        """releases: role -> release id. ids: of all test rows. The same releases get the same rows in the same order."""
        candidate, champion = releases[CANDIDATE], releases[CHAMPION]
        chance = random.Random(sha256_json([seed, candidate, champion]))
        drawn = chance.sample(list(ids), min(rows, len(ids)))
        return cls(prompt, run, candidate, champion, tuple((str(row), chance.choice((CANDIDATE, CHAMPION))) for row in drawn))

    def to_json(self) -> dict[str, Any]:
        releases = {CANDIDATE: self.candidate, CHAMPION: self.champion}
        return {"prompt": self.prompt, "run": self.run, **releases, "rows": [{"id": row, "a": role} for row, role in self.rows]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        rows = tuple((row["id"], row["a"]) for row in value["rows"])
        return cls(value["prompt"], value["run"], value[CANDIDATE], value[CHAMPION], rows)


class BlindRow(Section):
    """One row's grades as the page gives them out."""

    id: str
    a: Grade
    b: Grade
    comment: Annotated[str, Field(max_length=10_000)] = ""


class RatingsFile(Section):
    """What the page's button "Save ratings" gives out."""

    format: Literal[1]
    prompt: str
    run: Annotated[str, Field(pattern=RUN_ID)]
    candidate: Annotated[str, Field(pattern=RELEASE)]
    champion: Annotated[str, Field(pattern=RELEASE)]
    ratings: Annotated[tuple[BlindRow, ...], Field(min_length=1)]


class RatedRow(Section):
    """One row's grades by release."""

    id: str
    candidate: Grade
    champion: Grade
    comment: str


class Ratings(Section):
    """What one person said about a run's sample."""

    by: str
    at: str
    """When they were saved, ISO 8601, UTC."""
    candidate: str
    champion: str
    ratings: tuple[RatedRow, ...]


def read_ratings(text: str, where: str) -> RatingsFile:
    """Raises BadInputError naming every field that is wrong."""
    try:
        return RatingsFile.model_validate(json.loads(text))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise BadInputError(f"{where} is not a file that a decision's report gave out: {wrong}") from None
    except ValueError as error:
        raise BadInputError(f"{where} is no JSON: {error}; save it again from the decision's report") from None


def unblind(file: RatingsFile, sample: Sample, by: str, at: str) -> Ratings:
    """The ratings by release. Raises BadInputError for a file of another prompt, run, pair of releases or sample, or a row rated twice."""
    for name in ("prompt", "run", CANDIDATE, CHAMPION):
        ours, theirs = getattr(file, name), getattr(sample, name)
        if ours != theirs:
            raise BadInputError(f"{name} must be {theirs!r}, that of the run's sample, got {ours!r}; rate the run's present report")
    first, seen, rows = dict(sample.rows), set(), []
    for row in file.ratings:
        if row.id not in first or row.id in seen:
            problem = "is not in the run's sample" if row.id not in first else "is rated twice"
            raise BadInputError(f"row {row.id!r} {problem}; save the ratings again from the run's report")
        seen.add(row.id)
        ours, theirs = (row.a, row.b) if first[row.id] == CANDIDATE else (row.b, row.a)
        rows.append(RatedRow(id=row.id, candidate=ours, champion=theirs, comment=row.comment))
    return Ratings(by=by, at=at, candidate=sample.candidate, champion=sample.champion, ratings=tuple(rows))


def summary(people: Iterable[Ratings]) -> dict[str, float]:
    """Metrics over all rows of all people: share of outputs that are good, of the candidate (`rated_good`) and of the champion; share of
    rows on which the candidate's was graded better minus the share on which the champion's was, -1 to 1; how many rows and people.

    people: at least one, each with at least one row.
    """
    listed = list(people)
    rows = [row for ratings in listed for row in ratings.ratings]
    steps = [GRADES.index(row.champion) - GRADES.index(row.candidate) for row in rows]
    return {
        "rated_good": sum(row.candidate == "good" for row in rows) / len(rows),
        "champion_rated_good": sum(row.champion == "good" for row in rows) / len(rows),
        "rated_preference": (sum(step > 0 for step in steps) - sum(step < 0 for step in steps)) / len(rows),
        "rated_rows": float(len(rows)),
        "rated_people": float(len(listed)),
    }
