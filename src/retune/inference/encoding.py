"""From rows to token ids: the template's rendering and its tokens, the same for training, evaluation and serving."""

import copy
import math
import string
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
from tokenizers import Tokenizer

from retune.config import Prompt
from retune.errors import BadInputError, ConfigError
from retune.inference.base_model import Family
from retune.text import clean, split_references

__all__ = ["Encoder", "Rows", "check_labels", "cut_text", "plain_tokenizer", "records"]

Rows = pd.DataFrame | Sequence[Mapping[str, Any]]
"""Input rows by field; fields that the prompt does not name are ignored."""


class Encoder:
    """Turns rows of one prompt into token ids.

    The template decides what is a special token: one written in the template is one, the same characters in a user's text are ordinary
    text. A single newline at the template's end is dropped, because YAML's block scalars (`template: |`) always add one.
    """

    def __init__(self, prompt: Prompt, tokenizer: Any, family: Family = "decoder") -> None:
        """tokenizer: a transformers tokenizer with a `tokenizers` backend; it is copied, so that threads do not share its settings.

        family: of the base model. A decoder's answer goes on from the template's last word. An encoder's input has the end that the
        tokenizer gives a text, and so has an encoder-decoder's, whose answer is a text of its own. An encoder's answer is the label's
        number: its head knows no words.
        """
        self._family = family
        self._plain = plain_tokenizer(tokenizer)
        self._special = _backend(tokenizer, split_special=False)
        self._special_ids = {i for i, token in self._special.get_added_tokens_decoder().items() if token.special}
        self._start, self._end = _start_ids(self._special, tokenizer.bos_token_id), list[int]()
        if family != "decoder":
            self._start, self._end = _around(self._special)
        template = prompt.template.removesuffix("\n")
        self._parts = [(literal, field) for literal, field, _, _ in string.Formatter().parse(template)]
        self._pieces = self._split_at_special_tokens()
        self._template_special_ids = [piece for piece in self._pieces if isinstance(piece, int)]
        self._inputs = prompt.inputs
        self._max_tokens = prompt.preprocess.max_tokens
        self._target = prompt.target
        self._labels = {label: label for label in prompt.labels} if family == "encoder" else prompt.labels
        self._separator = "" if prompt.labels or template[-1:].isspace() or family != "decoder" else " "
        tail = self._pieces[-1] if self._pieces and family == "decoder" else ""
        self._tail = tail[1] if isinstance(tail, tuple) and tail[0] == "text" else ""

    def prompts(self, rows: Rows) -> list[list[int]]:
        """Token ids of the rendered template for each row, a leading token of the tokenizer's (such as `<s>`) included.

        Every input field is cleaned as preprocess cleans it, then cut to `preprocess.max_tokens` tokens; the template's own tokens are
        never cut.

        Raises BadInputError naming the row and the field that is missing or empty of a value.
        """
        fields = [self._fields(number, row) for number, row in enumerate(records(rows))]
        flat = cut_text(self._plain, [text for row in fields for text in row], self._max_tokens)
        width = len(self._inputs)
        values = [dict(zip(self._inputs, flat[i * width : (i + 1) * width], strict=True)) for i in range(len(fields))]
        return [self._with_end(self._with_start(ids)) for ids in self._encode(values)]

    def answers(self, rows: Rows) -> list[list[list[int]]]:
        """Token ids of each row's references, without the end of the sequence; classification: of its one label.

        Raises BadInputError naming the row whose target is missing or, for classification, is none of the labels.
        """
        texts = [self._answer_texts(number, row) for number, row in enumerate(records(rows))]
        if self._family == "encoder":
            numbers = {label: [number] for number, label in enumerate(self._labels)}
            return [[numbers[text] for text in of_row] for of_row in texts]
        known = {text: self._answer_ids(text) for of_row in texts for text in of_row}
        return [[known[text] for text in of_row] for of_row in texts]

    def labels(self) -> list[list[int]]:
        """Token ids of each label's words (of an encoder: its number), in the prompt's order. Raises ConfigError (see `check_labels`)."""
        if self._family == "encoder":
            return [[number] for number in range(len(self._labels))]
        ids = [self._answer_ids(words) for words in self._labels.values()]
        check_labels(dict(zip(self._labels, ids, strict=True)))
        return ids

    def _fields(self, number: int, row: Mapping[str, Any]) -> list[str]:
        return [clean(_value(number, row, field)) for field in self._inputs]

    def _encode(self, values: list[dict[str, str]]) -> list[list[int]]:
        """values: field -> text, for each row."""
        rendered = ["".join(literal + (row[field] if field else "") for literal, field in self._parts) for row in values]
        if not self._template_special_ids:
            return [encoding.ids for encoding in self._plain.encode_batch(rendered, add_special_tokens=False)]
        # Joint encoding gives the tokens that the model was trained with. It is right as long as it holds the template's special tokens
        # and no others; a text that brings its own is encoded piece by piece, each piece as plain text.
        ids = [encoding.ids for encoding in self._special.encode_batch(rendered, add_special_tokens=False)]
        return [
            row if [i for i in row if i in self._special_ids] == self._template_special_ids else self._encode_pieces(value)
            for row, value in zip(ids, values, strict=True)
        ]

    def _encode_pieces(self, value: dict[str, str]) -> list[int]:
        ids: list[int] = []
        text = ""
        for piece in [*self._pieces, None]:
            if isinstance(piece, tuple):
                text += piece[1] if piece[0] == "text" else value[piece[1]]
                continue
            ids += self._plain.encode(text, add_special_tokens=False).ids if text else []
            ids += [] if piece is None else [piece]
            text = ""
        return ids

    def _split_at_special_tokens(self) -> list[int | tuple[str, str]]:
        """The template as special token ids, ("text", literal) and ("field", name), in order."""
        pieces: list[int | tuple[str, str]] = []
        for literal, field in self._parts:
            encoding = self._special.encode(literal, add_special_tokens=False)
            at = 0
            for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if i in self._special_ids:
                    pieces += [("text", literal[at:start])] if start > at else []
                    pieces.append(i)
                    at = end
            pieces += [("text", literal[at:])] if literal[at:] else []
            pieces += [("field", field)] if field else []
        return pieces

    def _with_start(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._start)] == self._start else self._start + ids

    def _with_end(self, ids: list[int]) -> list[int]:
        return ids if not self._end or ids[-len(self._end) :] == self._end else ids + self._end

    def _answer_texts(self, number: int, row: Mapping[str, Any]) -> list[str]:
        value = _value(number, row, self._target)
        if not self._labels:
            return [self._separator + text.strip() for text in split_references(value)]
        if value not in self._labels:
            raise BadInputError(f"row {number}: {self._target} must be one of {', '.join(self._labels)}, got {value!r}")
        return [self._labels[value]]

    def _answer_ids(self, text: str) -> list[int]:
        """The answer's tokens as they follow the template's last words (sentence-piece tokenizers mark a text's start)."""
        if self._tail:
            tail = self._plain.encode(self._tail, add_special_tokens=False).ids
            joint = self._plain.encode(self._tail + text, add_special_tokens=False).ids
            if joint[: len(tail)] == tail:
                return joint[len(tail) :]
        return self._plain.encode(text, add_special_tokens=False).ids


def plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """The backend of a transformers tokenizer, set to read special tokens in a text as ordinary characters.

    It is what `split_special_tokens=True` sets for one call (transformers 5.23, `tokenization_utils_tokenizers.py`); on a copy of its own
    no other thread can switch it back between the setting and the call.
    """
    return _backend(tokenizer, split_special=True)


def cut_text(tokenizer: Tokenizer, texts: list[str], max_tokens: int) -> list[str]:
    """The texts, each cut at a character so that it has at most `max_tokens` tokens by itself.

    tokenizer: as of `plain_tokenizer`.
    """
    out = []
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        while len(encoding.ids) > max_tokens:
            # The first dropped token's start may lie inside a character that several tokens spell: all of it goes. A cut that would
            # change nothing (a token without characters of its own) takes one character.
            text = text[: min(encoding.offsets[max_tokens][0], len(text) - 1)]
            encoding = tokenizer.encode(text, add_special_tokens=False)
        out.append(text)
    return out


def check_labels(labels: Mapping[str, Sequence[int]]) -> None:
    """labels: label -> token ids of its words.

    Raises ConfigError if a label has no tokens, or its tokens begin another's: their probabilities would not be exclusive.
    """
    for label, ids in labels.items():
        if not ids:
            raise ConfigError(f"labels.{label} must have at least one token, got none")
    for (one, a), (other, b) in pairwise(sorted(labels.items(), key=lambda item: tuple(item[1]))):
        if list(b[: len(a)]) == list(a):
            raise ConfigError(
                f"labels.{one} and labels.{other} must differ before either ends, but the tokens of the first begin those of the second "
                f"({list(a)} and {list(b)}); choose other words"
            )


def records(rows: Rows) -> Sequence[Mapping[str, Any]]:
    if isinstance(rows, pd.DataFrame):
        return rows.rename(columns=str).to_dict("records")  # type: ignore[return-value]
    return rows


def _value(number: int, row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise BadInputError(f"row {number}: no field {field!r}; the row has {', '.join(map(str, row)) or 'no fields'}")
    value = row[field]
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        raise BadInputError(f"row {number}: field {field!r} must be text, got {value!r}")
    return str(value)


def _backend(tokenizer: Any, split_special: bool) -> Tokenizer:
    backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = split_special
    return backend


def _start_ids(backend: Tokenizer, bos: int | None) -> list[int]:
    """The tokenizer's own first token, where it puts one before every text."""
    ids = backend.encode("", add_special_tokens=True).ids
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text."""
    plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]
