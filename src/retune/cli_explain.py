"""`retune explain`: what a release's soft prompt learned."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retune.cli_output import AsJson, console, emit, reach_mlflow
from retune.errors import RetuneError
from retune.settings import without_password

if TYPE_CHECKING:
    from retune.explain import Explanation, Neighbour
    from retune.settings import Settings

__all__ = ["explain"]

FOLDER = "explain"
"""Folder of the figures among the artifacts of the release's MLflow run."""
SHOWN = 3
"""Neighbours of a virtual token in the table; `--json` and MLflow have more."""


def explain(
    prompt: Annotated[str, typer.Argument(help="Name of a prompt.")],
    release: Annotated[str | None, typer.Option("--release", help="A release id, or its beginning; none: the champion.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Most validation rows to measure on.")] = 256,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write the plot to this PNG file too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show for each virtual token its nearest words, what leaving it out costs, and the attention that answers pay to it."""
    from retune.evaluation.plots import render, virtual_tokens_figure
    from retune.explain import explain, validation_rows
    from retune.settings import Settings
    from retune.tuned import open_tuned
    from retune.workspace import Workspaces

    settings = Settings.load()
    workspaces = Workspaces(settings)
    tuned = open_tuned(workspaces, prompt, release)
    frame, known = validation_rows(workspaces, tuned, rows)
    progress = console(stderr=True)
    passes = len(tuned.soft_prompt) + 2
    progress.print(f"reading {len(frame)} of {known} validation rows {passes} times", markup=False)
    found = explain(tuned, frame)
    image = render(virtual_tokens_figure(found))
    if plot:
        plot.write_bytes(image)
    run = _log(settings, found, image)
    if as_json:
        emit({**found.to_json(), "validation_rows": known, "mlflow_run_id": run})
        return
    _show(found, known)
    if run:
        console().print(f"figures and plot are in MLflow, run {run}, folder {FOLDER}", markup=False)


def _log(settings: "Settings", found: "Explanation", image: bytes) -> str | None:
    """Logs figures and plot to the MLflow run that tuned the release, and returns its id; None, and why, if that cannot be."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # nobody should wait minutes for what is extra
    try:
        reach_mlflow(settings)
        from mlflow.exceptions import MlflowException

        from retune.registry import Registry
        from retune.tracking import Tracker

        uri = os.environ["MLFLOW_TRACKING_URI"]
        tracker = Tracker(uri, found.prompt)
        try:
            version = Registry(uri, found.prompt).find(found.release)
            run = str(version.run_id) if version else tracker.computed(found.release, besides="")
            if run is None:
                raise RetuneError(f"experiment {found.prompt} has no run of release {found.release[:12]}; was it deleted?")
            with tempfile.TemporaryDirectory(prefix="retune-plots-") as scratch:
                tracker.figure(run, image, f"{FOLDER}/virtual_tokens.png", Path(scratch))
            tracker.json(run, found.to_json(), f"{FOLDER}/virtual_tokens.json")
        except MlflowException as error:
            raise RetuneError(f"{without_password(uri)}: {error.message}") from None
    except RetuneError as error:
        console(stderr=True).print(f"nothing was logged to MLflow: {error}", markup=False)
        return None
    return run


def _show(found: "Explanation", known: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    out.print(
        f"{found.prompt}, release {found.release[:12]}, {found.rows} of {known} validation rows: loss {found.loss:.4f} nats per answer "
        f"token, {found.template_loss:.4f} without the soft prompt",
        markup=False,
    )
    table = Table("token", "effect", "attention", "nearest by cosine", "nearest by distance", box=None, pad_edge=False)
    for token in found.tokens:
        effect = f"{token.effect:+.4f}"
        table.add_row(
            str(token.number),
            effect if token.effect > 0 else f"[dim]{effect}[/]",
            f"{token.attention:.2%}",
            escape(_words([(n, n.cosine) for n in token.by_cosine])),
            escape(_words([(n, n.distance) for n in token.by_distance])),
        )
    out.print(table)
    out.print(
        "effect: validation loss without the token minus the loss with all; above 0, the token is of use\n"
        f"attention: what the tokens that predict the answers pay to it; the text keeps {found.text_attention:.2%}, an even share would be "
        f"{found.even_attention:.2%}",
        markup=False,
    )


def _words(neighbours: list[tuple["Neighbour", float]]) -> str:
    return ", ".join(f"{neighbour.text!r} {value:.2f}" for neighbour, value in neighbours[:SHOWN])
