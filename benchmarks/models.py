"""Random models of Llama's kind, random rows, and both ways to tune on them: Retune's step, and PEFT under the Trainer.

Letters: B rows of a batch, P virtual tokens, V vocabulary.
"""

import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel
from retune.inference.decoder import answer_losses, lay
from retune.inference.inputs import EncodedRow
from retune.inference.precision import fast_bf16, multiply_in_fp32

__all__ = [
    "LEARNING_RATE",
    "LONGEST",
    "SIZES",
    "B",
    "PeftTrainer",
    "collate",
    "peft_loop",
    "random_base",
    "random_model",
    "random_rows",
    "retune_loop",
    "start_prompt",
    "with_peft",
]

SIZES = {"5M": (256, 6, 4, 2, 704), "30M": (512, 9, 8, 4, 1376), "125M": (768, 12, 12, 12, 2048)}
"""Parameters without embeddings: hidden size, layers, heads, key-value heads, width of the feed-forward layers."""
B = 16
LONGEST = 276
"""Tokens of the longest row, answer included."""
LEARNING_RATE = 0.01

Loop = Callable[[Sequence[EncodedRow]], float]
"""Trains on the rows in their order, in batches of B, and returns the seconds of its steps."""


def random_model(size: str, vocab: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same weights every time; nothing ends a sequence."""
    hidden, layers, heads, groups, width = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=width,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    return model.requires_grad_(False)


def random_base(size: str, vocab: int, dtype: torch.dtype = torch.float32) -> BaseModel:
    model = random_model(size, vocab, dtype)
    if dtype == torch.bfloat16 and not fast_bf16():  # as a model is loaded
        multiply_in_fp32(model)
    return BaseModel(model, SimpleNamespace(eos_token_id=None), "", "")


def start_prompt(size: str, soft: int) -> torch.Tensor:
    """[P, hidden size]"""
    return torch.randn(soft, SIZES[size][0], generator=torch.Generator().manual_seed(1)) * 0.05


def random_rows(count: int, vocab: int, seed: int, answers: tuple[int, int] = (1, 20)) -> list[EncodedRow]:
    """Inputs of log-normal length, median 40, 4 to 256 tokens; answers of evenly distributed length."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = min(256, max(4, round(math.exp(rng.gauss(math.log(40), 0.8)))))
        rows.append(EncodedRow(*([rng.randrange(1, vocab) for _ in range(n)] for n in (length, rng.randint(*answers)))))
    return rows


def collate(rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
    """A batch as PEFT takes it, padded on the right to its longest row."""
    width = max(map(len, rows))
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor([*row.prompt, *row.answer])
        mask[i, : len(row)] = 1
        labels[i, len(row.prompt) : len(row)] = torch.tensor(row.answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_peft(model: Any, start: torch.Tensor) -> Any:
    """The model under PEFT's prompt tuning, from the same start."""
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start)))
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.copy_(start)
    return tuned


def retune_loop(base: BaseModel, start: torch.Tensor) -> Loop:
    """The steps of `retune.prompt_tuning.trainer` without its validation."""
    soft = start.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([soft], lr=LEARNING_RATE, weight_decay=0.0)

    def run(rows: Sequence[EncodedRow]) -> float:
        begun = time.perf_counter()
        for at in range(0, len(rows), B):
            prefix = Prefix(vectors=soft)
            loss = answer_losses(base, prefix, lay(base, prefix, rows[at : at + B])).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([soft], 1.0)
            optimizer.step()
        return time.perf_counter() - begun

    return run


def peft_loop(tuned: Any) -> Loop:
    """A plain loop over PEFT's model, without the Trainer."""
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def run(rows: Sequence[EncodedRow]) -> float:
        begun = time.perf_counter()
        for at in range(0, len(rows), B):
            loss = tuned(**collate(rows[at : at + B])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return time.perf_counter() - begun

    return run


class PeftTrainer:
    """transformers' Trainer with its defaults: AdamW, clipping at 1, padding to the longest row of a batch.

    Saving, logging and progress bars are off; its start-up is not timed. Rows come in the order given, so that both sides train on the
    same batches.
    """

    def __init__(self, tuned: Any, *callbacks: TrainerCallback, **arguments: Any) -> None:
        """arguments: of TrainingArguments, over the ones set here."""
        self.clock = _Clock()
        self._folder = tempfile.TemporaryDirectory(prefix="retune-bench-")
        settings = {"learning_rate": LEARNING_RATE, "per_device_train_batch_size": B, "num_train_epochs": 1} | {
            "train_sampling_strategy": "sequential",
            **arguments,
        }
        self._trainer = Trainer(
            model=tuned,
            args=TrainingArguments(
                output_dir=self._folder.name,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=True,
                **settings,
            ),
            data_collator=collate,
            train_dataset=[],
            callbacks=[self.clock, *callbacks],
        )
        from transformers.trainer_callback import PrinterCallback

        self._trainer.remove_callback(PrinterCallback)

    def __call__(self, rows: Sequence[EncodedRow]) -> float:
        """A `Loop`, from the first step's begin to the last one's end."""
        self._trainer.train_dataset = list(rows)
        self._trainer.train()
        return self.clock.seconds


class _Clock(TrainerCallback):
    begun = seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.begun
