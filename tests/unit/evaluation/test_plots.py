import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from retune.errors import BadInputError
from retune.evaluation.metrics import confusion, evaluate
from retune.evaluation.plots import (
    COLOURS,
    MAX_SLICES,
    MAX_TOKENS,
    confusion_figure,
    per_class_figure,
    render,
    slices_figure,
    virtual_tokens_figure,
)
from retune.evaluation.roles import ROLE_TITLES
from retune.explain import Explanation, Neighbour, VirtualToken

PNG = b"\x89PNG\r\n\x1a\n"
TARGET, CHAMPION, CANDIDATE = [0, 0, 1, 1, 2, 2], [0, 1, 1, 0, 2, -1], [0, 0, 1, 1, 2, 0]


@pytest.fixture
def evaluations(make_frame, make_prompt):
    channel = ["web", "web", "web", "web", "mail", "$5 & $6"]
    sides = {"champion": CHAMPION, "candidate": CANDIDATE}
    return {role: evaluate(make_frame(TARGET, said, channel=channel), make_prompt(), role, "e") for role, said in sides.items()}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_confusion_figure_writes_every_count_and_strays_only_if_any(make_frame, labels):
    figure = confusion_figure(confusion(make_frame(TARGET, CHAMPION), labels), labels, "champion")
    assert texts(figure.axes[0]) == ["1", "1", "0", "0", "1", "1", "0", "0", "0", "0", "1", "1"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [*labels, "(other)"]
    figure = confusion_figure(confusion(make_frame(TARGET, CANDIDATE), labels), labels, "candidate")
    assert texts(figure.axes[0]) == ["2", "0", "0", "0", "2", "0", "1", "0", "1"]


def test_confusion_figure_refuses_a_matrix_of_another_shape(labels):
    with pytest.raises(BadInputError, match=r"matrix must be \[3, 4\] for 3 labels, got \[3, 3\]"):
        confusion_figure(np.zeros((3, 3), dtype=np.int64), labels, "candidate")


def test_per_class_figure_has_a_bar_for_each_label_and_role(evaluations):
    axes = per_class_figure(evaluations).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    # F1 by hand. Champion: low 2/4, medium 2/4, high 2/3; candidate: low 4/5, medium 1, high 2/3.
    assert heights == [pytest.approx([0.5, 0.5, 2 / 3]), pytest.approx([0.8, 1.0, 2 / 3])]
    assert [bars.get_label() for bars in axes.containers] == ["champion", "candidate"]
    every = per_class_figure(dict.fromkeys(COLOURS, evaluations["champion"])).axes[0]
    assert [bars.get_label() for bars in every.containers] == list(ROLE_TITLES.values())
    assert len({bars.patches[0].get_facecolor() for bars in every.containers}) == len(ROLE_TITLES)
    with pytest.raises(BadInputError, match="evaluations must hold the same labels"):
        per_class_figure({"candidate": replace(evaluations["candidate"], per_class={})})


def test_slices_figure_shows_the_largest_slices_and_says_how_many_it_leaves_out(evaluations):
    axes = slices_figure(evaluations["champion"], evaluations["candidate"], "accuracy", 2).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["channel=$5 & $6 (1)", "channel=mail (1)", "channel=web (4)"]
    many = {"channel": {f"v{n}": {"accuracy": 0.5, "rows": n} for n in range(MAX_SLICES + 3)}}
    axes = slices_figure(*[replace(evaluations[role], slices=many) for role in ("champion", "candidate")], "accuracy", 2).axes[0]
    assert axes.get_yticklabels()[0].get_text() == "channel=v3 (3)"
    assert "3 smaller slices left out" in axes.get_title()
    with pytest.raises(BadInputError, match="evaluation must have slices to draw, got none"):
        slices_figure(evaluations["champion"], replace(evaluations["candidate"], slices={}), "accuracy", 2)


def explanation(effects):
    near = [Neighbour(7, "$5 & $6", 0.5, 2.0)]
    tokens = [VirtualToken(n, effect, 0.01 * n, near, near) for n, effect in enumerate(effects, 1)]
    return Explanation("p", "a" * 64, 10, 20, 0.4, 0.9, 0.7, 0.02, tokens)


def test_virtual_tokens_figure_has_a_row_for_each_token_with_effect_and_attention():
    effect, attention = virtual_tokens_figure(explanation([0.3, -0.1])).axes
    assert [tick.get_text() for tick in effect.get_yticklabels()] == ["1  '$5 & $6'", "2  '$5 & $6'"]
    assert [bar.get_width() for bar in effect.containers[0]] == [0.3, -0.1]
    assert [bar.get_width() for bar in attention.containers[0]] == pytest.approx([1, 2])
    assert list(attention.lines[0].get_xdata()) == [2, 2]


def test_virtual_tokens_figure_keeps_those_of_the_largest_effect_in_their_order():
    figure = virtual_tokens_figure(explanation([0.001 * (n % (MAX_TOKENS + 2)) for n in range(MAX_TOKENS + 2)]))
    numbers = [int(tick.get_text().split()[0]) for tick in figure.axes[0].get_yticklabels()]
    assert numbers == list(range(3, MAX_TOKENS + 3))
    assert "2 of smaller effect left out" in figure.get_suptitle()


@pytest.mark.parametrize(("form", "start"), [("png", PNG), ("svg", b"<?xml")])
def test_the_same_figure_gives_the_same_bytes(evaluations, form, start):
    first, second = (render(slices_figure(evaluations["champion"], evaluations["candidate"], "accuracy", 2), form) for _ in range(2))
    assert first.startswith(start)
    assert first == second


def test_the_gate_and_the_figures_module_do_not_load_matplotlib():
    code = "import sys, retune.promotion, retune.evaluation.plots, retune.evaluation.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
