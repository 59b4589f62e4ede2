"""From rows to token ids: the template's rendering and its tokens, the same for training, evaluation and serving."""

import copy
import math
import string
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
from tokenizers import Tokenizer

from retune.config import Prompt
from retune.errors import BadInputError, ConfigError
from retune.inference.base_model import Family
from retune.inference.retrieval import Nearest
from retune.text import clean, split_references

__all__ = ["Encoder", "Rows", "check_labels", "cut_text", "field_text", "plain_tokenizer", "records", "references"]

Rows = pd.DataFrame | Sequence[Mapping[str, Any]]
"""Input rows by field; fields that the prompt does not name are ignored, an `id` apart: with examples, no row is its own."""

Shot = tuple[Mapping[str, str], str]
"""What the template is rendered with (field -> text), and what follows it: of an example its answer and a blank line."""


class Encoder:
    """Turns rows of one prompt into token ids.

    The template decides what is a special token: one written in the template is one, the same characters in a user's text are ordinary
    text. A single newline at the template's end is dropped, because YAML's block scalars (`template: |`) always add one.
    """

    def __init__(self, prompt: Prompt, tokenizer: Any, family: Family = "decoder", examples: Sequence[Mapping[str, str]] = ()) -> None:
        """tokenizer: a transformers tokenizer with a `tokenizers` backend; it is copied, so that threads do not share its settings.

        examples: what the `tune.examples` that stand before each row are chosen from (see `retune.inference.examples`); none: the row
        stands alone.

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
        self._prompt, self._inputs = prompt, prompt.inputs
        self._labels = {label: label for label in prompt.labels} if family == "encoder" else prompt.labels
        self._apart = not template[-1:].isspace()
        self._separator = "" if prompt.labels or not self._apart or family != "decoder" else " "
        tail = self._pieces[-1] if self._pieces and family == "decoder" else ""
        self._tail = tail[1] if isinstance(tail, tuple) and tail[0] == "text" else ""
        self._shots = self._chosen_from(examples)
        self._nearest = Nearest([_words(values) for values, _ in self._shots], prompt.tune.examples) if examples else None
        self._numbers = {example["id"]: number for number, example in enumerate(examples) if "id" in example}

    def prompts(self, rows: Rows, room: Sequence[int] | None = None) -> list[list[int]]:
        """Token ids of the rendered template for each row, a leading token of the tokenizer's (such as `<s>`) included.

        Every input field is cleaned as preprocess cleans it, then cut to `preprocess.max_tokens` tokens; the template's own tokens are
        never cut. The examples most like the row stand before it, rendered alike, the most alike next to it.

        room: tokens that there are for each row; examples beyond it are left out, the least alike first. None: as many as it takes.

        Raises BadInputError naming the row and the field that is missing or empty of a value.
        """
        table = records(rows)
        values = self._values(table)
        shots = [[*examples, (of_row, "")] for examples, of_row in zip(self._examples(table, values), values, strict=True)]
        encoded = self._encode(shots)
        if room is None:
            return encoded
        return [
            ids if len(row) == 1 or len(ids) <= most else self._fitted(row, most)
            for ids, row, most in zip(encoded, shots, room, strict=True)
        ]

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

    def _values(self, table: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Field -> text as the model reads it, for each row."""
        fields = [[clean(field_text(number, row, field)) for field in self._inputs] for number, row in enumerate(table)]
        flat = cut_text(self._plain, [text for row in fields for text in row], self._prompt.preprocess.max_tokens)
        width = len(self._inputs)
        return [dict(zip(self._inputs, flat[i * width : (i + 1) * width], strict=True)) for i in range(len(fields))]

    def _chosen_from(self, examples: Sequence[Mapping[str, str]]) -> list[Shot]:
        answers = [self._answer_texts(number, example)[0] for number, example in enumerate(examples)]
        if self._family != "decoder" and self._apart:  # an answer that is a text of its own brings no space to stand behind a word
            answers = [text if text[:1].isspace() else f" {text}" for text in answers]
        return [(values, f"{answer}\n\n") for values, answer in zip(self._values(examples), answers, strict=True)]

    def _examples(self, table: Sequence[Mapping[str, Any]], values: Sequence[Mapping[str, str]]) -> list[list[Shot]]:
        """Those of each row, the most alike last."""
        if self._nearest is None:
            return [[] for _ in values]
        own = [self._numbers.get(str(row.get("id"))) for row in table]
        return [[self._shots[i] for i in numbers] for numbers in self._nearest.of([_words(row) for row in values], own)]

    def _fitted(self, shots: Sequence[Shot], room: int) -> list[int]:
        """The tokens with as many of the examples as there is room for; the row itself, which stands last, stays in any case."""

        def fits(left_out: int) -> bool:
            return len(self._encode([shots[left_out:]])[0]) <= room

        return self._encode([shots[bisect_left(range(len(shots) - 1), True, key=fits) :]])[0]

    def _encode(self, rows: Sequence[Sequence[Shot]]) -> list[list[int]]:
        """Token ids of each row's shots as one text."""
        rendered = ["".join(self._rendered(values) + more for values, more in row) for row in rows]
        if not self._template_special_ids:
            found = [encoding.ids for encoding in self._plain.encode_batch(rendered, add_special_tokens=False)]
        else:
            # Joint encoding gives the tokens that the model was trained with. It is right as long as it holds the template's special
            # tokens and no others; a text that brings its own is encoded piece by piece, each piece as plain text.
            found = [encoding.ids for encoding in self._special.encode_batch(rendered, add_special_tokens=False)]
            special = [[i for i in ids if i in self._special_ids] for ids in found]
            wanted = [self._template_special_ids * len(row) for row in rows]
            found = [
                ids if has == due else self._encode_pieces(row) for ids, has, due, row in zip(found, special, wanted, rows, strict=True)
            ]
        return [self._with_end(self._with_start(of_row)) for of_row in found]

    def _rendered(self, values: Mapping[str, str]) -> str:
        return "".join(literal + (values[field] if field else "") for literal, field in self._parts)

    def _encode_pieces(self, row: Sequence[Shot]) -> list[int]:
        ids: list[int] = []
        text = ""
        for values, more in row:
            for piece in [*self._pieces, ("text", more)]:
                if isinstance(piece, tuple):
                    text += piece[1] if piece[0] == "text" else values[piece[1]]
                    continue
                ids += [*self._tokens(text), piece]
                text = ""
        return ids + self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        """Of plain text that no other text stands beside."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids if text else []
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
        texts = references(number, row, self._prompt)
        return [self._labels[text] for text in texts] if self._labels else [self._separator + text for text in texts]

    def _answer_ids(self, text: str) -> list[int]:
        """The answer's tokens as they follow the template's last words (sentence-piece tokenizers mark a text's start)."""
        if self._tail:
            tail, joint = self._tokens(self._tail), self._tokens(self._tail + text)
            if joint[: len(tail)] == tail:
                return joint[len(tail) :]
        return self._tokens(text)


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


def references(number: int, row: Mapping[str, Any], prompt: Prompt) -> list[str]:
    """The right answers of a row: texts, or one label.

    Raises BadInputError naming the row whose target is missing, empty or none of the labels.
    """
    value = field_text(number, row, prompt.target)
    if not prompt.labels:
        texts = [text.strip() for text in split_references(value)]
        if not all(texts):
            raise BadInputError(
                f"row {number}: {prompt.target} must not be empty, got {value[:100]!r}; give the row an answer, or leave it out"
            )
        return texts
    if value not in prompt.labels:
        raise BadInputError(f"row {number}: {prompt.target} must be one of {', '.join(prompt.labels)}, got {value!r}")
    return [value]


def field_text(number: int, row: Mapping[str, Any], field: str) -> str:
    """A field's value as text. Raises BadInputError naming the row that has none."""
    if field not in row:
        raise BadInputError(f"row {number}: no field {field!r}; the row has {', '.join(map(str, row)) or 'no fields'}")
    value = row[field]
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        raise BadInputError(f"row {number}: field {field!r} must be text, got {value!r}")
    return str(value)


def _words(values: Mapping[str, str]) -> str:
    """What rows are compared by."""
    return "\n".join(values.values())


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
