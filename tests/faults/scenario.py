"""What a fault scenario is, and where it works.

    @scenario("tune-killed", "kill -9 of the worker", "tune", "killed after the second checkpoint", fast=True)
    def tune_killed(bench: Bench) -> Outcome: ...

A scenario does its fault to real components in `bench.folder`, lets the work be tried again as Airflow would, and counts from ledger, store
and MLflow what is missing and what is there twice. What several scenarios need and takes long to start, such as an S3 server, is a context
manager that takes a folder, and `bench.shared` enters it once: scenarios against another stack bring theirs in the same way.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

__all__ = ["SCENARIOS", "Bench", "NotPossible", "Outcome", "Row", "Scenario", "scenario"]

T = TypeVar("T")


class NotPossible(Exception):
    """Says why the scenario cannot run here."""


class Row(TypedDict):
    """One line of benchmarks/faults.json."""

    name: str
    fault: str
    stage: str
    did: str
    happened: str
    recovered: bool
    seconds: float
    lost: int
    doubled: int


@dataclass(frozen=True)
class Outcome:
    recovered: bool
    """The work that the fault met was done in the end, or the damage named, with nothing else touched."""
    seconds: float
    """From the fault to that moment; the longest, where a scenario does several."""
    lost: int
    """Rows, releases, entries, objects, runs that should be there and are not."""
    doubled: int
    """Those that are there more often than they should."""
    happened: str
    """A sentence with what was seen."""


@dataclass(frozen=True)
class Scenario:
    name: str
    fault: str
    stage: str
    did: str
    fast: bool
    """Runs in CI too."""
    function: Callable[["Bench"], Outcome]

    def run(self, bench: "Bench") -> Row:
        """Raises NotPossible, or whatever went wrong: a scenario that could not count has no row."""
        with bench.at(self.name):
            found = self.function(bench)
        return {
            "name": self.name,
            "fault": self.fault,
            "stage": self.stage,
            "did": self.did,
            "happened": found.happened,
            "recovered": found.recovered,
            "seconds": round(found.seconds, 1),
            "lost": found.lost,
            "doubled": found.doubled,
        }


SCENARIOS: dict[str, Scenario] = {}
"""By name, in the order in which their modules are imported."""


def scenario(name: str, fault: str, stage: str, did: str, fast: bool = False) -> Callable[[Callable[["Bench"], Outcome]], Any]:
    """Enters a function among the scenarios."""

    def enter(function: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        if name in SCENARIOS:
            raise ValueError(f"two scenarios are called {name}")
        SCENARIOS[name] = Scenario(name, fault, stage, did, fast, function)
        return function

    return enter


class Bench:
    """The folder of the scenario that runs, and what scenarios share. A context manager: its end stops what was started."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self._root = root
        self.random = random.Random(seed)
        """For moments that are left to chance."""
        self._running = ExitStack()
        self._shared: dict[Any, Any] = {}
        self._failed: dict[Any, Exception] = {}
        self._alone = ExitStack()
        self.folder = root

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        with self._running:
            self._alone.close()

    def shared(self, start: Callable[["Bench", Path], AbstractContextManager[T]]) -> T:
        """What the context manager gives, started at the first call. It is handed this bench and a folder of its own.

        A start that failed is not tried again: its error is raised to every scenario that asks.
        """
        return self._started(start, self._running)

    def alone(self, start: Callable[["Bench", Path], AbstractContextManager[T]]) -> T:
        """As `shared`, for what takes the machine to itself: it ends when the next one starts."""
        if start not in self._shared:
            self._alone.close()
        return self._started(start, self._alone)

    def _started(self, start: Callable[["Bench", Path], AbstractContextManager[T]], until: ExitStack) -> T:
        if start in self._failed:
            raise self._failed[start]
        if start not in self._shared:
            folder = self._root / "shared" / start.__name__
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._shared[start] = until.enter_context(start(self, folder))
            except Exception as error:
                self._failed[start] = error
                raise
        found: T = self._shared[start]
        return found

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        self.folder = self._root / name
        self.folder.mkdir(parents=True)
        try:
            yield
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = self._root


class Stopwatch:
    """Seconds since it was made, or since the latest `start`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun
