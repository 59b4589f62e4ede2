"""`retune rate`: what a person said about a run's sample of outputs, kept beside the run."""

import getpass
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retune.cli_output import AsJson, console, emit, reach_mlflow
from retune.errors import BadInputError, ConfigError
from retune.settings import without_password

if TYPE_CHECKING:
    from retune.evaluation.sample import Ratings, Sample
    from retune.tracking import Tracker

__all__ = ["rate"]

FOLDER = "decision/ratings"
"""Folder of the ratings among the artifacts of a DAG run's MLflow run: a file per person."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"


def rate(
    prompt: Annotated[str, typer.Argument(help="Name of a prompt.")],
    file: Annotated[
        Path, typer.Argument(help="A file that a decision's report gave out (its button Save ratings), or - for standard input.")
    ],
    by: Annotated[str | None, typer.Option("--by", help="Who rated; default: the user of this machine.")] = None,
    as_json: AsJson = False,
) -> None:
    """Enter what a person said about a run's sample of outputs: a file and metrics of the run in MLflow. A second file of the same person
    takes the place of the first."""
    from retune.config import load_prompt
    from retune.evaluation.sample import read_ratings, summary, unblind
    from retune.settings import Settings

    settings = Settings.load()
    load_prompt(settings.prompts / f"{prompt}.yaml")
    who = by or getpass.getuser()
    if not re.fullmatch(NAME, who):
        raise ConfigError(f"--by must be up to 64 letters (a to z), digits, '.', '_', '@' and '-', a letter or digit first, got {who!r}")
    given = read_ratings(_text(file), str(file))
    reach_mlflow(settings)
    from mlflow.exceptions import MlflowException

    from retune.tracking import Tracker

    tracker = Tracker(os.environ["MLFLOW_TRACKING_URI"], prompt)
    try:
        sample = _sample(tracker, given.run)
        mine = unblind(given, sample, who, datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"))
        everyone = {**_earlier(tracker, sample), who: mine}
        found = summary(everyone.values())
        tracker.json(given.run, mine.model_dump(mode="json"), f"{FOLDER}/{who}.json")
        tracker.metrics(given.run, found)
    except MlflowException as error:
        raise BadInputError(f"{without_password(tracker.client.tracking_uri)}: {error.message}") from None
    own = summary([mine])
    if as_json:
        emit({"prompt": prompt, "mlflow_run_id": given.run, "candidate": sample.candidate, "by": who, "own": own, "everyone": found})
        return
    out = console()
    out.print(
        f"{who}: {own['rated_rows']:.0f} of {len(sample.rows)} rows; good: candidate {own['rated_good']:.0%}, champion "
        f"{own['champion_rated_good']:.0%}; preference for the candidate {own['rated_preference']:+.2f} (-1 to 1)",
        markup=False,
    )
    out.print(
        f"all {found['rated_people']:.0f} of the run: good: candidate {found['rated_good']:.0%}, champion "
        f"{found['champion_rated_good']:.0%}; preference {found['rated_preference']:+.2f}; kept in MLflow, run {given.run}, {FOLDER}",
        markup=False,
    )


def _text(file: Path) -> str:
    try:
        return typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text("utf-8")
    except FileNotFoundError:
        raise BadInputError(f"no such file: {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{file} cannot be read: {error}") from None


def _sample(tracker: "Tracker", run: str) -> "Sample":
    """The sample that a run's report asks to rate. Raises BadInputError for an unknown run, or one without a report."""
    from mlflow.exceptions import MlflowException

    from retune.evaluation.sample import Sample
    from retune.tasks.page import SAMPLE

    try:
        kept = tracker.artifacts(run, str(Path(SAMPLE).parent)).get(SAMPLE)
    except MlflowException as error:
        raise BadInputError(
            f"{without_password(tracker.client.tracking_uri)} knows no run {run} (unknown, or deleted): {error.message}"
        ) from None
    if kept is None:
        raise BadInputError(f"MLflow run {run} has no {SAMPLE}: it is not the run of a decision")
    return Sample.from_json(json.loads(kept))


def _earlier(tracker: "Tracker", sample: "Sample") -> "dict[str, Ratings]":
    """What everyone said so far about this candidate and champion, by name; the run may have been decided on another champion before."""
    from retune.evaluation.sample import Ratings

    kept = [Ratings.model_validate_json(text) for text in tracker.artifacts(sample.run, FOLDER).values()]
    return {each.by: each for each in kept if (each.candidate, each.champion) == (sample.candidate, sample.champion)}
