"""A release at work: rows in, predictions out. Used by evaluation, the command line and the MLflow model alike."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch

from retune.config import Prompt
from retune.errors import BadInputError, ConfigError, IntegrityError
from retune.inference.adapters import soft_prompt, tuned_model
from retune.inference.attention import Prefix
from retune.inference.base_model import BaseModel, open_base_model
from retune.inference.encoding import Encoder, Rows
from retune.inference.families import carried, family_of, generate_batch, row_losses
from retune.inference.inputs import EncodedRow, LabelTree, check_length, encode_with_answers, room, sorted_batches
from retune.inference.release import Release, read_release

__all__ = ["PREDICTION", "Predictor", "answer_nats", "probability_column"]

PREDICTION = "prediction"
"""Column of the predicted label or text."""
TOKENS = 1024
"""Tokens of a forward pass; more are slower on a CPU."""


def probability_column(label: str) -> str:
    return f"p_{label}"


def answer_nats(base: BaseModel, prefix: Prefix | None, rows: Sequence[EncodedRow]) -> np.ndarray:
    """Negative log-likelihood of each row's answer in nats, [N], fp64."""
    losses = np.zeros(len(rows))
    for numbers in sorted_batches(rows, TOKENS, carried(base, prefix)):
        laid = family_of(base).lay(base, prefix, [rows[i] for i in numbers])
        losses[numbers] = row_losses(base, prefix, laid)
    return losses


class Predictor:
    """One prompt on one base model. Holds no state between calls; calls from several threads do not disturb each other."""

    def __init__(
        self, base: BaseModel, prompt: Prompt, tensors: Mapping[str, torch.Tensor], examples: Sequence[Mapping[str, str]] = ()
    ) -> None:
        """tensors, examples: what was tuned, or is chosen from, as in a release; both empty: the template alone. `base` stays as it is.

        Raises ConfigError for labels that cannot be told apart, BadInputError for a tensor, a task or a method that does not fit the base
        model.
        """
        self.base, self._prefix = tuned_model(base, prompt, tensors)
        self.prompt = prompt
        soft = soft_prompt(prompt.tune, tensors)
        self.soft_prompt = None if soft is None else soft.detach().to(base.device)
        """[P, H]; None where something else was tuned, or nothing."""
        self._on_base = base.family == "decoder" and (soft is not None or not tensors)
        self._examples = examples
        self._encoder = Encoder(prompt, base.tokenizer, base.family, examples)
        self._carried = carried(self.base, self._prefix)
        self._labels = self._encoder.labels() if prompt.task == "classification" else []

    @classmethod
    def load(cls, folder: Path, base_models: Sequence[Path] = (), project: Path | None = None, release_id: str | None = None) -> Self:
        """Reads and verifies a release, then finds, verifies and loads its base model.

        base_models: folders in which the base model is looked up. release_id: the id that the release must have.

        Raises IntegrityError if the release or the base model is not the recorded one, BadInputError if the base model is not found.
        """
        release = read_release(folder, release_id)
        return cls.of(release, open_base_model(release.prompt.base_model, project, base_models))

    @classmethod
    def of(cls, release: Release, base: BaseModel) -> Self:
        """The release on a base model that is already loaded. Raises IntegrityError if it is not the model of the release."""
        for name, recorded, found in (
            ("base model", release.base_sha256, base.sha256),
            ("tokenizer", release.tokenizer_sha256, base.tokenizer_sha256),
        ):
            if recorded != found:
                raise IntegrityError(f"release {release.id} was made with the {name} {recorded}, but this one has {found}")
        try:
            return cls(base, release.prompt, release.tensors, release.examples)
        except BadInputError as error:
            raise IntegrityError(f"release {release.id}: {error}") from None

    def reworded(self, template: str) -> Self:
        """The same release behind another template with the same fields."""
        other = copy.copy(self)
        other.prompt = self.prompt.model_copy(update={"template": template})
        other._encoder = Encoder(other.prompt, self.base.tokenizer, self.base.family, self._examples)
        other._labels = other._encoder.labels() if self._labels else []
        return other

    def predict(self, rows: Rows) -> pd.DataFrame:
        """One output row per input row, in the same order (a DataFrame's index is kept).

        classification: `prediction` and a probability per label, `p_<label>`, which add up to 1. generation: `prediction`.

        Raises BadInputError naming the row and field at fault.
        """
        index = rows.index if isinstance(rows, pd.DataFrame) else pd.RangeIndex(len(rows))
        if self.prompt.task == "generation":
            return pd.DataFrame({PREDICTION: pd.Series(self.generate(rows), index=index, dtype="str")})
        scores = self.score_labels(rows).double()
        names = list(self.prompt.labels)
        predictions = pd.Series([names[i] for i in scores.argmax(1).tolist()], index=index, dtype="str")
        shares = scores.softmax(1).numpy()  # [N, C]
        columns = {probability_column(name): pd.Series(shares[:, i], index=index) for i, name in enumerate(names)}
        return pd.DataFrame({PREDICTION: predictions, **columns})

    def score_labels(self, rows: Rows) -> torch.Tensor:
        """Log-probability of each label's words after each row, [N, C] in the order of the prompt's labels, fp32 on the CPU. Of an encoder:
        of the label itself.

        Raises ConfigError for a prompt without labels.
        """
        if not self._labels:
            raise ConfigError(f"{self.prompt.name}: only task: classification has labels to score")
        tree = LabelTree(self._labels)
        encoded = self._encode(rows, self.answer_tokens)
        out = torch.zeros(len(encoded), len(self._labels))
        for numbers in sorted_batches(encoded, TOKENS, len(tree) + self._carried):
            out[numbers] = family_of(self.base).score_batch(self.base, self._prefix, [encoded[i] for i in numbers], tree).cpu()
        return out

    def generate(self, rows: Rows) -> list[str]:
        """Text that the model writes after each row, without outer white space."""
        return [text for text, _ in self.write(rows)]

    def write(self, rows: Rows) -> list[tuple[str, bool]]:
        """The texts of `generate`, and whether each was cut at `generation.max_new_tokens`."""
        settings = self.prompt.generation
        encoded = self._encode(rows, settings.max_new_tokens)
        out = [("", False)] * len(encoded)
        for numbers in sorted_batches(encoded, TOKENS, settings.max_new_tokens + self._carried):
            batch = [encoded[i] for i in numbers]
            written = generate_batch(self.base, self._prefix, batch, settings.max_new_tokens, settings.temperature)
            for i, ids in zip(numbers, written, strict=True):
                out[i] = self._decode(ids).strip(), len(ids) >= settings.max_new_tokens
        return out

    def stream(self, row: Mapping[str, Any]) -> Iterator[str]:
        """The text of `generate` piece by piece, as the model writes it; joined, the pieces are that text."""
        settings = self.prompt.generation
        encoded = self._encode([row], settings.max_new_tokens)
        ids: list[int] = []
        sent = ""
        steps = family_of(self.base).generate_steps(self.base, self._prefix, encoded, settings.max_new_tokens, settings.temperature)
        for (token,) in steps:
            ids += [] if token is None else [token]
            text = self._decode(ids).strip()
            if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(sent):  # else: a character is still in the making
                yield text[len(sent) :]
                sent = text
        yield self._decode(ids).strip()[len(sent) :]

    def reference_losses(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood of each row's references, end of sequence included, as in training.

        Returns (sum over the tokens of all of a row's references in nats [N], those tokens [N]).

        Raises BadInputError for a row without a usable target.
        """
        encoded, owners = encode_with_answers(self.base, self._encoder, self._soft_tokens, rows)
        losses = answer_nats(self.base, self._prefix, encoded)
        sums, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
        rows_of = np.array(owners, dtype=np.int64)
        np.add.at(sums, rows_of, losses)
        np.add.at(counts, rows_of, [len(row.answer) for row in encoded])
        return sums, counts

    def perplexity(self, rows: Rows) -> float:
        """exp of the mean negative log-likelihood per answer token over all rows. Raises ConfigError without rows."""
        sums, counts = self.reference_losses(rows)
        if not counts.sum():
            raise ConfigError("perplexity needs at least one row with an answer")
        return float(np.exp(sums.sum() / counts.sum()))

    @torch.no_grad()
    def prompt_embeddings(self, row: Mapping[str, Any]) -> torch.Tensor:
        """What the model reads for a row, [P + T, H] on the CPU: the soft prompt, then the T tokens of the rendered template, embedded;
        examples, where there are any, are among them.

        It is the whole prompt for whatever else runs the base model on embeddings (transformers' `inputs_embeds`, vLLM's
        `prompt_embeds`): such a model then answers as this one does. Raises BadInputError as `predict` does, and for a method that tunes
        more than a soft prompt.
        """
        if not self._on_base:
            what = f"tune.method {self.prompt.tune.method}" if self.base.family == "decoder" else f"an {self.base.family}"
            raise BadInputError(f"{self.prompt.name}: prompt embeddings are all that a soft prompt on a decoder needs; this is {what}")
        (encoded,) = self._encode([row], self.answer_tokens)
        tokens = self.base.embed(torch.tensor(encoded.prompt, dtype=torch.long, device=self.base.device))
        return (tokens if self.soft_prompt is None else torch.cat([self.soft_prompt.to(self.base.dtype), tokens])).cpu()

    def answer(self, row: Mapping[str, Any]) -> str:
        """The predicted label or text of one row. Raises as `predict` does."""
        return str(self.predict([row])[PREDICTION].iloc[0])

    def prompt_tokens(self, rows: Rows) -> list[int]:
        """Tokens of each row's rendered template, [N]; virtual tokens are not among them."""
        return [len(row.prompt) for row in self._encode(rows, self.answer_tokens)]

    @property
    def answer_tokens(self) -> int:
        """Most tokens of an answer: those of the longest label, or as many as may be generated."""
        return max(map(len, self._labels)) if self._labels else self.prompt.generation.max_new_tokens

    @property
    def _soft_tokens(self) -> int:
        return 0 if self._prefix is None else self._prefix.size

    def _decode(self, ids: list[int]) -> str:
        text: str = self.base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, rows: Rows, new: int) -> list[EncodedRow]:
        """new: answer tokens for which the context must leave room."""
        left = room(self.base, self._soft_tokens, new)
        encoded = [EncodedRow(ids) for ids in self._encoder.prompts(rows, [left] * len(rows))]
        for number, row in enumerate(encoded):
            check_length(number, row, self._soft_tokens, new, self.base)
        return encoded
