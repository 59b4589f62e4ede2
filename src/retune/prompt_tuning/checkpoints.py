"""A tuning run's state on disk, so that a run that was killed goes on where it stood and ends with the same bytes.

One file, replaced whole: the sha256 of what follows in hex, a newline, then a safetensors file whose header holds the rest as JSON.
What a file belongs to is the business of whoever names it: the run's inputs must be the same.
"""

import hashlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from retune.errors import StageError

__all__ = ["Checkpoint", "State", "Stop", "StoppedError"]

logger = logging.getLogger(__name__)


@dataclass
class State:
    """Where a run stands after `step` optimizer steps."""

    step: int
    tensors: dict[str, torch.Tensor]
    """By name: parameters, the optimizer's moments, the best so far."""
    figures: dict[str, Any]
    """Plain JSON: losses, steps, the curve. Python writes floats so that they read back the same."""


@dataclass
class Checkpoint:
    """The file of one run."""

    path: Path
    every: float = 60.0
    """Seconds between two saves."""
    saved: Callable[[Path, int], None] = lambda *_: None
    """Called after each save with the file and the step."""
    _last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def save(self, state: State) -> None:
        """Replaces the file: it is the old one or the new one, never part of one. A full disk leaves the old one, and stops no tuning."""
        figures = json.dumps({"step": state.step, **state.figures}, allow_nan=False)
        content = save({name: x.detach().cpu().contiguous() for name, x in state.tensors.items()}, metadata={"figures": figures})
        partial = self.path.with_name(self.path.name + ".partial")
        self._last = time.monotonic()
        try:
            partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            logger.warning("the checkpoint of step %d was not saved (%s); tuning goes on", state.step, error.strerror)
            return
        self.saved(self.path, state.step)

    def load(self) -> State | None:
        """The state in the file; None where there is none. A damaged file is named in the log and counts as none."""
        if not self.path.is_file():
            return None
        digest, _, content = self.path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            logger.warning("the checkpoint %s is damaged (its sha256 is not the recorded one): tuning starts anew", self.path.name)
            return None
        try:
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            figures = json.loads(header["__metadata__"]["figures"])
            return State(figures.pop("step"), tensors, figures)
        except (SafetensorError, ValueError, KeyError) as error:
            logger.warning("the checkpoint %s cannot be read (%r): tuning starts anew", self.path.name, error)
            return None


class StoppedError(StageError):
    """The run was told to end; its state is saved where it has a checkpoint."""


class Stop:
    """SIGTERM as an exception at the next moment at which the run's state is whole."""

    def __init__(self) -> None:
        self._whole = True
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM raises StoppedError inside the block. For a process's main thread."""
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A change of the state that must not be cut in two: the exception waits for the block's end."""
        self._whole = False
        try:
            yield
        finally:
            self._whole = True
        if self._asked:
            self._raise()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if self._whole:
            self._raise()

    def _raise(self) -> None:
        self._asked = False
        raise StoppedError("stopped by SIGTERM")
