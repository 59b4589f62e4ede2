"""How rows that were forgotten are known again without being kept: by a keyed digest of their cleaned input texts.

Redaction, white space and spelling of entities make no difference (`clean(redact(x)) == clean(x)`), so a landed row, the row of a part and
the row of a split have one digest. Two rows with the same input texts have it too, whoever wrote them: what must not come back is the text.
The key stands beside the digests: who reads both can confirm a guess of a whole text, and read none.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pandas as pd

from retune.errors import ConfigError
from retune.text import clean

__all__ = ["Forgotten"]


@dataclass(frozen=True)
class Forgotten:
    """Rows of one prompt that one call of `retune forget` removed."""

    inputs: tuple[str, ...]
    """Fields that the digest is over: the inputs that the prompt had then."""
    key: str
    """Hex."""
    digests: frozenset[str]

    @classmethod
    def new(cls, inputs: Sequence[str]) -> Self:
        return cls(tuple(inputs), secrets.token_hex(16), frozenset())

    def to_json(self) -> dict[str, Any]:
        return {"inputs": list(self.inputs), "key": self.key, "digests": sorted(self.digests)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(tuple(value["inputs"]), value["key"], frozenset(value["digests"]))

    def with_texts(self, rows: Iterable[Sequence[str]]) -> "Forgotten":
        return Forgotten(self.inputs, self.key, self.digests | {self._digest(texts) for texts in rows})

    def holds(self, texts: Sequence[str]) -> bool:
        return self._digest(texts) in self.digests

    def among(self, frame: pd.DataFrame) -> "pd.Series[bool]":
        """Which rows of a frame these are. None where the frame has not all of the fields, or a row not all of the texts."""
        if not self.digests or not set(self.inputs) <= set(frame.columns):
            return pd.Series(False, index=frame.index, dtype=bool)
        rows = zip(*(frame[name].astype(object) for name in self.inputs), strict=True)
        found = [all(isinstance(text, str) for text in texts) and self.holds(texts) for texts in rows]
        return pd.Series(found, index=frame.index, dtype=bool)

    def check(self, fields: Iterable[str]) -> None:
        """Raises ConfigError if rows with these fields alone could not be told from the forgotten ones."""
        if missing := sorted(set(self.inputs) - set(fields)):
            raise ConfigError(
                f"rows that were forgotten are known by {', '.join(self.inputs)}, and the prompt file has no {', '.join(missing)}: they "
                "would come back. Name the field again, as a slice if not in the template, or take the rows out of the landing zone"
            )

    def _digest(self, texts: Sequence[str]) -> str:
        content = json.dumps([clean(text) for text in texts]).encode()
        return hashlib.blake2b(content, key=bytes.fromhex(self.key), digest_size=16).hexdigest()
