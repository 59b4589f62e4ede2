"""Seconds to the validation loss that PEFT + Trainer reaches at its best learning rate, on an example prompt and the examples' base model.

Both search the same learning rates from the same start, on the same batches, and validate after the same steps.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import PeftTrainer, collate, with_peft
from rows import Row, of_rounds, ratios, say, skipped
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging

from retune.config import Prompt, load_prompt, override
from retune.data.ingest import ingest_object
from retune.data.landing import open_objects
from retune.data.parts import read_parts
from retune.data.preprocess import PreprocessResult, preprocess
from retune.inference.base_model import BaseModel, find_base_model, load_base
from retune.inference.encoding import Encoder
from retune.inference.inputs import EncodedRow, encode_with_answers, sorted_batches
from retune.prompt_tuning import initial_prompt, trainer, tune
from retune.prompt_tuning.result import CurveRow
from retune.prompt_tuning.schedule import epoch_batches

__all__ = ["measure"]

ROOT = Path(__file__).parents[1]
PROMPT = "ticket_priority"
FIGURE = "seconds to a validation loss"
LEARNING_RATES = (0.01, 0.03, 0.1)
SEEDS = (13, 14, 15)
EPOCHS = 3
EVERY = 20
"""Steps between validations."""
NEAR = 1.05
"""The goal is the lowest mean loss times this: single curves of the same arithmetic end up further apart than that."""
TOKENS = 2048
"""Tokens of a batch of PEFT's validation, which is sorted by length."""


@dataclass
class Run:
    """What was seen of one run after each validation. The clock starts with the first step: encoding and set-up do not count."""

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Validations included."""
    training: list[float] = field(default_factory=list)
    """The same without validations."""

    def add(self, loss: float, step: int, seconds: float, validating: float) -> None:
        self.losses.append(loss)
        self.steps.append(step)
        self.seconds.append(seconds)
        self.training.append(seconds - validating)

    @property
    def best(self) -> float:
        return min(self.losses)


def measure(quick: bool) -> list[Row]:
    changes = {"tune.validate_every": EVERY, "tune.epochs": 1 if quick else EPOCHS}
    prompt = override(load_prompt(ROOT / f"prompts/{PROMPT}.yaml"), changes)
    rates, seeds = (LEARNING_RATES[:1], SEEDS[:1]) if quick else (LEARNING_RATES, SEEDS)
    path = find_base_model(prompt.base_model, ROOT)
    base = load_base(path)
    transformers_logging.disable_progress_bar()
    splits = _splits(prompt)
    shown = f"{PROMPT}, {len(splits.train)} rows, {len(seeds)} seeds, learning rate searched on {len(rates)}"
    runs: dict[str, dict[float, list[Run]]] = {"peft": {}, "retune": {}}
    for rate in rates:
        for seed in seeds:
            trial = override(prompt, {"tune.learning_rate": rate, "tune.seed": seed})
            runs["peft"].setdefault(rate, []).append(_peft_run(path, base, trial, splits))
            runs["retune"].setdefault(rate, []).append(_retune_run(base, trial, splits))
            found = ", ".join(f"{side} {of[rate][-1].best:.4f} in {of[rate][-1].seconds[-1]:.1f} s" for side, of in runs.items())
            say(f"convergence, seed {seed}, learning rate {rate:g}: {found}")
    best = {side: min(of.values(), key=lambda some: float(_mean(some).min())) for side, of in runs.items()}
    goal = NEAR * float(_mean(best["peft"]).min())
    reached = {side: np.flatnonzero(_mean(some) <= goal) for side, some in best.items()}
    if not len(reached["retune"]):
        lowest = float(_mean(best["retune"]).min())
        return [skipped(FIGURE, shown, f"PEFT + Trainer reached {goal:.4f} nats on average, Retune {lowest:.4f}")]
    at = {side: int(found[0]) for side, found in reached.items()}
    whole = {side: [run.seconds[at[side]] for run in some] for side, some in best.items()}
    training = {side: [run.training[at[side]] for run in some] for side, some in best.items()}
    steps = {side: [float(some[0].steps[at[side]])] for side, some in best.items()}
    return [
        ratios(FIGURE, f"{shown}: PEFT + Trainer / Retune, validation included", whole["peft"], whole["retune"]),
        ratios(FIGURE, f"{shown}: PEFT + Trainer / Retune, training alone", training["peft"], training["retune"]),
        of_rounds(FIGURE, f"{shown}: PEFT + Trainer, validation included", whole["peft"], "s"),
        of_rounds(FIGURE, f"{shown}: Retune, validation included", whole["retune"], "s"),
        of_rounds(FIGURE, f"{shown}: PEFT + Trainer", steps["peft"], "steps"),
        of_rounds(FIGURE, f"{shown}: Retune", steps["retune"], "steps"),
        of_rounds(FIGURE, f"{shown}: the loss", [goal], "nats"),
    ]


def _mean(runs: Sequence[Run]) -> np.ndarray:
    """Losses after each validation, mean over the seeds."""
    return np.mean([run.losses for run in runs], axis=0)


def _splits(prompt: Prompt) -> PreprocessResult:
    """Of the prompt's first two batches, through the product's own ingest and preprocess."""
    with tempfile.TemporaryDirectory(prefix="retune-bench-") as temporary:
        folder = Path(temporary)
        for batch in ("1", "2"):
            shutil.copytree(ROOT / f"examples/batches/{prompt.name}/{batch}", folder / "landing", dirs_exist_ok=True)
        landed = enumerate(open_objects("landing", root=folder).objects)
        results = [ingest_object(prompt, item, number, folder / "parts") for number, item in landed]
        splits = preprocess(read_parts([folder / "parts" / result.part for result in results if result.part]), prompt)
    # Whole batches only: the Trainer, which is handed all epochs as one, would fill a smaller one from the next epoch.
    return replace(splits, train=splits.train[: len(splits.train) // prompt.tune.batch_size * prompt.tune.batch_size])


def _retune_run(base: BaseModel, prompt: Prompt, splits: PreprocessResult) -> Run:
    run = Run()
    with _timed_validation() as spent:

        def on_step(row: CurveRow) -> None:
            if row["validation_loss"] is not None:
                (_, begun), *since = spent
                validating = sum(end - start for start, end in since)
                run.add(row["validation_loss"], row["step"], time.perf_counter() - begun, validating)

        tune(base, prompt, splits.train, splits.validation, on_step)
    return run


@contextmanager
def _timed_validation() -> Iterator[list[tuple[float, float]]]:
    """Start and end of each validation that the trainer makes; the first one takes place before the first step."""
    spent: list[tuple[float, float]] = []
    original = trainer.validation_loss

    def timed(*arguments: Any) -> float:
        begun = time.perf_counter()
        try:
            return original(*arguments)
        finally:
            spent.append((begun, time.perf_counter()))

    trainer.validation_loss = timed
    try:
        yield spent
    finally:
        trainer.validation_loss = original


def _peft_run(path: Path, base: BaseModel, prompt: Prompt, splits: PreprocessResult) -> Run:
    settings, encoder = prompt.tune, Encoder(prompt, base.tokenizer)
    size = settings.num_virtual_tokens
    train, _ = encode_with_answers(base, encoder, size, splits.train)
    validation, _ = encode_with_answers(base, encoder, size, splits.validation)
    model = LlamaForCausalLM.from_pretrained(path, attn_implementation="sdpa").requires_grad_(False)
    tuned = with_peft(model, initial_prompt(settings.init, base, size, settings.seed, settings.init_text))
    run = Run()
    train_with = PeftTrainer(
        tuned,
        _Validation(run, tuned, [[validation[i] for i in numbers] for numbers in sorted_batches(validation, TOKENS)]),
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
    )
    batches = epoch_batches([len(row) for row in train], settings)
    train_with([train[i] for _, numbers in batches for i in numbers])  # Retune's batches, as one epoch
    return run


class _Validation(TrainerCallback):
    """Mean over all answer tokens of the validation split after every EVERY steps and the last, by PEFT's own forward pass."""

    def __init__(self, run: Run, tuned: Any, batches: Sequence[Sequence[EncodedRow]]) -> None:
        self.run, self.tuned, self.batches = run, tuned, [collate(batch) for batch in batches]
        self.begun = self.spent = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step % EVERY and state.global_step != state.max_steps:
            return
        begun = time.perf_counter()
        loss = self._loss()
        now = time.perf_counter()
        self.spent += now - begun
        self.run.add(loss, state.global_step, now - self.begun, self.spent)

    @torch.no_grad()
    def _loss(self) -> float:
        total, count = 0.0, 0
        self.tuned.eval()
        for batch in self.batches:
            labels = batch["labels"][:, 1:]
            logits = self.tuned(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            total += float(F.cross_entropy(logits[:, -labels.shape[1] - 1 : -1].transpose(1, 2), labels, reduction="sum"))
            count += int((labels != -100).sum())
        self.tuned.train()
        return total / count
