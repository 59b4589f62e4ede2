"""Figures for MLflow and the report. Object interface of matplotlib with the Agg canvas: no pyplot, no global state, no display.

matplotlib is imported inside the functions, so that a DAG or the gate never pays for it. The same figure gives the same bytes:
nothing in them holds a time. Letters: K labels.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from retune.errors import BadInputError
from retune.evaluation.metrics import metric_named
from retune.evaluation.roles import BASELINE, CANDIDATE, CHAMPION, FEW_SHOT, ROLE_TITLES
from retune.records import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from retune.explain import Explanation

__all__ = ["confusion_figure", "per_class_figure", "render", "slices_figure", "virtual_tokens_figure"]

COLOURS = {BASELINE: "#999999", FEW_SHOT: "#009e73", CHAMPION: "#0072b2", CANDIDATE: "#d55e00"}
"""Role -> colour, told apart by colour-blind readers too (Okabe & Ito 2008)."""
MAX_NUMBERED = 15
"""Labels up to which a confusion matrix has its counts written in."""
MAX_SLICES = 40
"""Slices in one figure: those with the most rows; the report lists them all."""
MAX_TOKENS = 60
"""Virtual tokens in one figure: those with the largest effect."""


def render(figure: "Figure", form: Literal["png", "svg"] = "png") -> bytes:
    """The figure as the bytes of a file; PNG at 144 dots per inch."""
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "retune"}):
        figure.savefig(stream, format=form, dpi=144, metadata={"Date": None} if form == "svg" else {"Software": None})
    return stream.getvalue()


def confusion_figure(matrix: npt.NDArray[np.int64], labels: Sequence[str], title: str) -> "Figure":
    """Rows by reference and prediction, coloured by share of the reference.

    `matrix`: [K, K + 1] from `retune.evaluation.metrics.confusion`; its last column is drawn only if it counts something.
    """
    if matrix.shape != (len(labels), len(labels) + 1):
        raise BadInputError(f"matrix must be [{len(labels)}, {len(labels) + 1}] for {len(labels)} labels, got {list(matrix.shape)}")
    columns = [*labels, "(other)"] if matrix[:, -1].any() else list(labels)
    counts = matrix[:, : len(columns)]
    shares = counts / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(12.0, 2.2 + 0.75 * len(labels))
    figure = _figure(side + 0.75 * (len(columns) - len(labels)) + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the reference", fraction=0.046, pad=0.04)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("reference")
    axes.set_title(title, parse_math=False)
    if len(columns) <= MAX_NUMBERED:
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour)
    return figure


def per_class_figure(evaluations: Mapping[str, Evaluation], figure_of: Literal["precision", "recall", "f1"] = "f1") -> "Figure":
    """One group of bars per label, one bar per role (see `retune.evaluation.roles`).

    Raises BadInputError where the evaluations hold no or other labels.
    """
    roles = [role for role in ROLE_TITLES if role in evaluations]
    labels = list(evaluations[roles[0]].per_class) if roles else []
    if not labels or any(list(evaluations[role].per_class) != labels for role in roles):
        raise BadInputError(f"evaluations must hold the same labels for at least one of {', '.join(ROLE_TITLES)}, got {list(evaluations)}")
    figure = _figure(min(24.0, 2.5 + max(3.0, 0.9 * len(labels))), 3.8)
    axes = figure.add_subplot()
    width = 0.8 / len(roles)
    for number, role in enumerate(roles):
        heights = [evaluations[role].per_class[label][figure_of] for label in labels]
        places = np.arange(len(labels)) + (number - (len(roles) - 1) / 2) * width
        axes.bar(places, heights, width, color=COLOURS[role], label=ROLE_TITLES[role])
    rows = [f"{label}\n{evaluations[roles[0]].per_class[label]['rows']:,.0f} rows" for label in labels]
    turned = len(labels) > 8
    axes.set_xticks(range(len(labels)), rows, rotation=45 if turned else 0, ha="right" if turned else "center", parse_math=False)
    axes.set_ylim(0, 1)
    axes.set_ylabel(figure_of)
    axes.set_title(f"{figure_of} by label")
    _plain(axes, grid="y")
    figure.legend(loc="outside lower center", ncols=len(roles), frameon=False)
    return figure


def slices_figure(champion: Evaluation, candidate: Evaluation, metric: str, min_slice_rows: int) -> "Figure":
    """The metric of both releases in each slice, joined by a line; slices with fewer rows than are guarded are pale.

    Raises BadInputError where the candidate has no slices.
    """
    known = metric_named(metric)
    names = [(column, value) for column, values in candidate.slices.items() for value in values]
    if not names:
        raise BadInputError("evaluation must have slices to draw, got none; name slice columns in the prompt file (slices)")
    largest = sorted(names, key=lambda name: -candidate.slices[name[0]][name[1]]["rows"])[:MAX_SLICES]
    left_out = len(names) - len(largest)
    names = [name for name in names if name in largest]
    figure = _figure(7.5, 1.6 + 0.32 * len(names))
    axes = figure.add_subplot()
    for place, (column, value) in enumerate(names):
        ours = candidate.slices[column][value]
        theirs = champion.slices.get(column, {}).get(value, {})
        alpha = 1.0 if ours["rows"] >= min_slice_rows else 0.3
        if metric in theirs:
            axes.plot([theirs[metric], ours[metric]], [place, place], color="#bbbbbb", linewidth=2, alpha=alpha, zorder=1)
            axes.scatter(theirs[metric], place, color=COLOURS[CHAMPION], s=90, alpha=alpha, zorder=2)
        axes.scatter(ours[metric], place, color=COLOURS[CANDIDATE], s=40, alpha=alpha, zorder=3)
    rows = [f"{column}={value} ({candidate.slices[column][value]['rows']:,.0f})" for column, value in names]
    axes.set_yticks(range(len(names)), rows, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"{metric} ({'higher' if known.higher_is_better else 'lower'} is better)")
    smaller = f"; {left_out} smaller slices left out" if left_out else ""
    axes.set_title(f"{metric} by slice (test rows); pale: fewer than {min_slice_rows} rows, not guarded{smaller}", fontsize="small")
    for role in (CHAMPION, CANDIDATE):
        axes.scatter([], [], color=COLOURS[role], s=90 if role == CHAMPION else 40, label=ROLE_TITLES[role])
    _plain(axes, grid="x")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def virtual_tokens_figure(explanation: "Explanation") -> "Figure":
    """A row for each virtual token, named by its nearest word: what leaving it out costs, and the attention that answers pay to it."""
    largest = sorted(explanation.tokens, key=lambda token: -abs(token.effect))[:MAX_TOKENS]
    tokens = sorted(largest, key=lambda token: token.number)
    left_out = len(explanation.tokens) - len(tokens)
    figure = _figure(10.0, 1.8 + 0.26 * len(tokens))
    effect, attention = figure.subplots(1, 2, sharey=True)
    places = range(len(tokens))
    effect.barh(places, [token.effect for token in tokens], color=[COLOURS[CANDIDATE if t.effect > 0 else BASELINE] for t in tokens])
    effect.axvline(0, color="black", linewidth=0.8)
    effect.set_xlabel("validation loss without it, minus with all\n(nats per answer token; above 0: it is of use)")
    effect.set_yticks(places, [f"{token.number}  {token.by_cosine[0].text!r}" for token in tokens], parse_math=False)
    effect.set_ylim(len(tokens) - 0.5, -0.5)
    attention.barh(places, [100 * token.attention for token in tokens], color=COLOURS[CHAMPION])
    attention.axvline(100 * explanation.even_attention, color="black", linewidth=0.8, linestyle="--", label="an even share")
    attention.set_xlabel("attention of the answers, %\n(mean over layers, heads and answer tokens)")
    figure.legend(loc="outside lower right", frameon=False, fontsize="small")
    smaller = f"; {left_out} of smaller effect left out" if left_out else ""
    title = f"{explanation.prompt}: virtual tokens of release {explanation.release[:12]}, each by its nearest word{smaller}"
    figure.suptitle(title, fontsize="medium", parse_math=False)
    for axes in (effect, attention):
        _plain(axes, grid="x")
    return figure


def _figure(width: float, height: float) -> "Figure":
    """An empty figure, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: "Axes", grid: Literal["x", "y"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e5e5e5")
    axes.set_axisbelow(True)
