from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retune.config import Prompt

LABELS = ["low", "medium", "high"]


@pytest.fixture
def labels() -> list[str]:
    return list(LABELS)


@pytest.fixture
def make_frame() -> Callable[..., pd.DataFrame]:
    """Predictions frame from label codes 0 to 2 (a prediction of -1 is outside of the labels)."""

    def build(
        target: Sequence[int], prediction: Sequence[int], groups: Sequence[Any] | None = None, **columns: Sequence[Any]
    ) -> pd.DataFrame:
        rows = len(target)
        chances = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]])[list(prediction)]
        return pd.DataFrame(
            {
                "id": [f"row-{row}" for row in range(rows)],
                "group": [f"group-{row}" for row in range(rows)] if groups is None else list(groups),
                **columns,
                "target": [LABELS[code] for code in target],
                "prediction": [LABELS[code] if code >= 0 else "urgent" for code in prediction],
                **{f"p_{label}": chances[:, k] for k, label in enumerate(LABELS)},
            }
        )

    return build


@pytest.fixture
def make_texts() -> Callable[..., pd.DataFrame]:
    """Predictions frame of task: generation; each row's references are a list, each reference costs 2 nats and has 4 tokens."""

    def build(prediction: Sequence[str | None], references: Sequence[Sequence[str]], groups: Sequence[Any] | None = None) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "id": [f"row-{row}" for row in range(len(prediction))],
                "group": list(range(len(prediction)) if groups is None else groups),
                "target": ["\n".join(of_row) for of_row in references],
                "prediction": list(prediction),
                "reference_nats": [2.0 * len(of_row) for of_row in references],
                "reference_tokens": [4 * len(of_row) for of_row in references],
                "truncated": [False] * len(prediction),
            }
        )

    return build


@pytest.fixture
def make_prompt() -> Callable[..., Prompt]:
    def build(**fields: Any) -> Prompt:
        return Prompt.model_validate(
            {
                "name": "ticket_priority",
                "task": "classification",
                "base_model": {"path": "examples/base_model", "sha256": "0" * 64},
                "source": "examples/landing/ticket_priority",
                "template": "Ticket: {text}\nPriority:",
                "target": "label",
                "labels": {label: f" {label}" for label in LABELS},
                "slices": ["channel"],
                **fields,
            }
        )

    return build
