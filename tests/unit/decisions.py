"""Whole decisions on generated rows, through the gate's own code: what the decision's page and the model card are drawn from."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from retune.config import Prompt, Splits
from retune.evaluation.metrics import aggregate_metrics, evaluate
from retune.evaluation.page import Report
from retune.evaluation.sample import Sample
from retune.promotion import Side, decide
from retune.records import CheckResult, Evaluation, Lineage, Measured, Trigger

LABELS = ["low", "medium", "high"]
RELEASES = {"baseline": "0a" * 32, "champion": "1b" * 32, "candidate": "2c" * 32}
RUN = "3d" * 16
LINEAGE = Lineage(
    data="outs: []",
    lock="",
    overrides={"tune.learning_rate": 0.01},
    commit="4e" * 20,
    dirty=True,
    environment="5f" * 32,
    revision=7,
    machines={"tune": {"torch": "2.13.0", "threads": 2, "gpus": []}},
)
TRIGGER = Trigger("retrain_ticket_priority", "manual__2026-05-04", "manual", "anna", "slower rate", "http://127.0.0.1:8080/dags/x/runs/y")
PROBLEMS = (
    "cannot log in since this morning",
    "was charged twice for one order",
    "asks how to change the invoice address",
    "lost all reports",
)
PLACES = ("the web shop", "the mobile app", "our office in Lyon", "the warehouse")
MOODS = ("Please help soon.", "This is the third time I write!", "No hurry.", "We lose money every hour.", "Thanks in advance.")


def classification(rows: int = 400, better: float = 0.06, **promote: Any) -> Report:
    """A candidate that has about `better` more of the rows right than the champion, with slices, sets, trials, timings and checks."""
    prompt = prompt_of(
        "classification",
        labels={label: f" {label}" for label in LABELS},
        target="label",
        promote={"metric": "macro_f1", "min_gain": 0.02, "max_slice_gap": 0.05, "floors": {"accuracy": 0.6, "log_loss": 0.4}, **promote},
    )
    rng, test = np.random.default_rng(3), texts(rows)
    target = rng.integers(0, 3, rows)
    hard = rng.random(rows)
    frames = {}
    for role, share in (("baseline", 0.5), ("champion", 0.74), ("candidate", 0.74 + better)):
        right = hard + rng.normal(0, 0.08, rows) < share
        said = np.where(right, target, (target + 1 + (hard > 0.9)) % 3)
        sure = np.clip(np.where(right, rng.normal(0.84, 0.12, rows), rng.normal(0.62, 0.15, rows)), 0.36, 0.99)
        chances = np.repeat(((1 - sure) / 2)[:, None], 3, axis=1)
        chances[np.arange(rows), said] = sure
        frames[role] = test[["id", "group", "channel", "region"]].assign(
            target=[LABELS[code] for code in target],
            prediction=[LABELS[code] for code in said],
            **{f"p_{label}": chances[:, k] for k, label in enumerate(LABELS)},
        )
    return report_of(prompt, frames, test)


def generation(rows: int = 120) -> Report:
    prompt = prompt_of(
        "generation", name="ticket_summary", target="summary", promote={"metric": "rougeL", "floors": {"empty_outputs": 0.05}}
    )
    test = texts(rows)
    references = [
        f"{text.split('. ')[0].lower()}\n{text.split('. ')[0].lower()} in {place}"
        for text, place in zip(test["text"], test["region"], strict=True)
    ]
    rng = np.random.default_rng(5)

    def said(reference: str, cut: float) -> str:
        words = reference.split("\n")[0].split()
        return " ".join(word for word in words if rng.random() > cut)

    frames = {
        role: test[["id", "group", "channel", "region"]].assign(
            target=references,
            prediction=[said(reference, cut) for reference in references],
            reference_nats=rng.gamma(20, nats, rows),
            reference_tokens=24,
            truncated=False,
        )
        for role, cut, nats in (("baseline", 0.6, 2.0), ("champion", 0.3, 1.2), ("candidate", 0.15, 1.0))
    }
    return report_of(prompt, frames, test)


def prompt_of(task: str, name: str = "ticket_priority", **fields: Any) -> Prompt:
    raw = {
        "name": name,
        "task": task,
        "description": "How soon a support ticket must be answered",
        "intended_use": "Ordering the queue only; a person answers",
        "owner": "support-platform",
        "base_model": {"path": "examples/base_model", "sha256": "6" * 64},
        "source": "landing",
        "template": "Ticket: {text}\nAnswer:",
        "slices": ["channel", "region"],
    }
    return Prompt.model_validate(raw | fields)


def texts(rows: int) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    pick = lambda options: [options[i] for i in rng.integers(0, len(options), rows)]  # noqa: E731
    channel = np.array(["email", "chat", "phone", "app"])[rng.choice(4, rows, p=[0.5, 0.3, 0.15, 0.05])]
    said = [
        f"A customer {problem} in {place}. {mood}" for problem, place, mood in zip(pick(PROBLEMS), pick(PLACES), pick(MOODS), strict=True)
    ]
    return pd.DataFrame(
        {
            "id": [f"3:{row}" for row in range(rows)],
            "group": range(rows),
            "channel": channel,
            "region": pick(["emea", "amer", "apac"]),
            "text": said,
        }
    )


def report_of(prompt: Prompt, frames: dict[str, pd.DataFrame], test: pd.DataFrame, **parts: Any) -> Report:
    labels = list(prompt.labels)
    evaluations = {role: evaluate(frame, prompt, RELEASES[role], "7" * 64) for role, frame in frames.items()}
    evaluations = {role: with_sets(evaluation, frames[role], labels) for role, evaluation in evaluations.items()}
    sides = {role: Side(evaluations[role], frames[role], Splits(), "6" * 64) for role in ("candidate", "champion")}
    decision = decide(sides["candidate"], sides["champion"], prompt.promote, labels, barred=False, same_release=False)
    steps = range(0, 161, 20)
    trials = {"1: as in the prompt file": (1.1, 60), "2: learning_rate=0.01, seed=14": (1.1, 110)}
    known = {
        "curves": {
            name: [{"step": step, "train_loss": 1.0, "validation_loss": start * 2 ** (-step / half) + 0.2} for step in steps]
            for name, (start, half) in trials.items()
        },
        "trial": "1: as in the prompt file",
        "measured": {
            "champion": Measured(21.24, 35.0, 812.5, 1280, 41.0, None),
            "candidate": Measured(22.48, 37.5, 799.0, 2560, float("nan"), 0.0312),
        },
        "checks": [
            CheckResult("greets politely", False, True, "contains 'hello': yes."),
            CheckResult("urgent stays urgent", True, False, "expected 'high', got 'low'."),
        ],
    }
    sample = Sample.draw(prompt.name, RUN, RELEASES, list(test["id"]))
    return Report(
        prompt=prompt,
        decision=decision,
        evaluations=evaluations,
        predictions={role: frames[role] for role in ("candidate", "champion")},
        test=test,
        lineage=LINEAGE,
        trigger=TRIGGER,
        sample=sample,
        **{**known, **parts},
    )


def with_sets(evaluation: Evaluation, frame: pd.DataFrame, labels: list[str]) -> Evaluation:
    """A labelled set and two probes, as if measured on parts of the rows."""
    figures = {**aggregate_metrics(frame.head(50), labels), "rows": 50}
    sets = {"out_of_domain": figures, "typos": {**figures, "changed": 0.14}, "swaps": {**figures, "changed": 0.02}}
    return replace(evaluation, sets=sets)
