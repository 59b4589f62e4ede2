"""What a row must be, built from the prompt; and why a row is not, in words for whoever landed it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pandera.pandas as pandera
import pyarrow as pa
import pyarrow.compute as pc

from retune.data.columns import arrow, as_series, normalised

__all__ = ["KINDS", "Fields", "Tidied", "build_schema", "failures", "tidy"]

KINDS = (
    "malformed",
    "missing_text",
    "too_long",
    "too_short",
    "missing_label",
    "unknown_label",
    "missing_slice",
    "unknown_slice_value",
)
"""Why a row is quarantined; a row with several reasons counts under the first of them here."""


@dataclass(frozen=True)
class Fields:
    """The fields of a prompt and what they may hold."""

    inputs: tuple[str, ...]
    target: str
    labels: tuple[str, ...]
    """Empty: the target is free text."""
    slices: Mapping[str, Sequence[str] | None]
    """Slice -> allowed values; None: any."""
    min_characters: int
    max_characters: int

    def is_free(self, name: str) -> bool:
        """Whether the field holds text as a person wrote it, which is kept as it landed."""
        return name in self.inputs or (name == self.target and not self.labels)

    def allowed(self, name: str) -> Sequence[str] | None:
        """The values that the prompt declares for a label or slice; None or none: any."""
        return self.labels if name == self.target else self.slices.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.inputs, self.target, *self.slices)))


@dataclass(frozen=True)
class Tidied:
    frame: pd.DataFrame
    """Inputs normalised, labels and slice values stripped and in their declared spelling; NaN where empty."""
    respelled: dict[str, set[tuple[str, str]]]
    """Field -> (as landed, as declared), where only case differed."""


def tidy(frame: pd.DataFrame, fields: Fields) -> Tidied:
    respelled: dict[str, set[tuple[str, str]]] = {}
    columns: dict[str, pd.Series[Any]] = {}
    for name in fields.names:
        allowed = fields.allowed(name)
        if fields.is_free(name) and not allowed:
            texts = normalised(arrow(frame[name]))
        else:  # values that are few and repeat: each is looked at once
            landed = arrow(frame[name]).dictionary_encode()
            values = normalised(landed.dictionary).to_pylist()
            spelled = _declared(values, allowed or ())
            if changed := {(was, now) for was, now in zip(values, spelled, strict=True) if was != now}:
                respelled[name] = changed
            texts = pa.array(spelled, landed.dictionary.type).take(landed.indices)
        columns[name] = as_series(pc.if_else(pc.equal(texts, ""), None, texts), frame[name])
    return Tidied(pd.DataFrame(columns, index=frame.index), respelled)


def _declared(values: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """The values, those in their declared spelling that differ from it in case alone."""
    declared = {value.casefold(): value for value in allowed} | {value: value for value in allowed}
    return [declared.get(value) or declared.get(value.casefold(), value) for value in values]


def build_schema(fields: Fields) -> pandera.DataFrameSchema:
    """The pandera schema of a tidied frame. Each check's error is a kind and the words of the reason."""
    columns = {}
    for name in fields.names:
        checks = []
        if name in fields.inputs:
            checks.append(_at_least(fields.min_characters, name))
        if fields.is_free(name):
            checks.append(_at_most(fields.max_characters, name))
        allowed = fields.allowed(name)
        if allowed:
            kind = "unknown_label" if name == fields.target else "unknown_slice_value"
            checks.append(pandera.Check.isin(list(allowed), error=f"{kind}|{name} must be one of {', '.join(allowed)}, got {{}}"))
        columns[name] = pandera.Column("str", checks, nullable=name in fields.slices and not fields.slices[name])
    return pandera.DataFrameSchema(columns, index=pandera.Index("int64", unique=True))


def failures(tidied: pd.DataFrame, schema: pandera.DataFrameSchema, fields: Fields) -> pd.DataFrame:
    """Index: row numbers that fail; columns `kind` and `reason` (all reasons of the row)."""
    try:
        schema.validate(tidied[~_sound(tidied, fields)], lazy=True)
    except pandera.errors.SchemaErrors as error:
        cases = error.failure_cases
    else:
        return pd.DataFrame({"kind": [], "reason": []}, dtype="str", index=pd.Index([], name="row", dtype="int64"))
    reasons: dict[int, list[tuple[int, str]]] = {}
    for column, check, value, row in zip(cases["column"], cases["check"], cases["failure_case"], cases["index"], strict=True):
        if check == "not_nullable":
            kind, reason = _missing(str(column), fields), f"{column} must not be empty"
        elif "|" in str(check):
            kind, words = str(check).split("|", 1)
            got: Any = len(value) if kind in ("too_long", "too_short") else value[:60]
            reason = words.removesuffix("{}") + repr(got)
        else:
            raise ValueError(f"the frame does not fit the schema: {column}: {check}")
        reasons.setdefault(int(row), []).append((KINDS.index(kind), reason))
    rows = sorted(reasons)
    return pd.DataFrame(
        {
            "kind": [KINDS[min(reasons[row])[0]] for row in rows],
            "reason": ["; ".join(reason for _, reason in sorted(reasons[row])) for row in rows],
        },
        index=pd.Index(rows, name="row", dtype="int64"),
        dtype="str",
    )


def _sound(tidied: pd.DataFrame, fields: Fields) -> npt.NDArray[np.bool_]:
    """Rows that the schema cannot find fault with, found in a fraction of its time: the others are its to judge."""
    sound = np.full(len(tidied), tidied.index.is_unique)
    for name in fields.names:
        texts = arrow(tidied[name])
        length = pc.utf8_length(texts)
        fine = [texts.is_valid()] if fields.allowed(name) or name not in fields.slices else []
        if name in fields.inputs:
            fine.append(pc.greater_equal(length, fields.min_characters))
        if fields.is_free(name):
            fine.append(pc.less_equal(length, fields.max_characters))
        if allowed := fields.allowed(name):
            fine.append(pc.is_in(texts, pa.array(list(allowed), texts.type)))
        for check in fine:
            sound &= np.asarray(pc.fill_null(check, False))
    return sound


def _missing(column: str, fields: Fields) -> str:
    if column in fields.inputs:
        return "missing_text"
    return "missing_label" if column == fields.target else "missing_slice"


def _at_least(characters: int, name: str) -> pandera.Check:
    reason = f"too_short|{name} must have at least {characters} character(s), got {{}}"
    return pandera.Check(lambda texts: texts.str.len() >= characters, error=reason)


def _at_most(characters: int, name: str) -> pandera.Check:
    reason = f"too_long|{name} must have at most {characters} character(s), got {{}}"
    return pandera.Check(lambda texts: texts.str.len() <= characters, error=reason)
