"""Typed records that pass between the parts. All turn into plain JSON (`to_json`) and back (`from_json`)."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

__all__ = ["CheckResult", "Comparison", "Decision", "Evaluation", "Gate", "Lineage", "Measured", "Trigger", "Verdict"]

Verdict = Literal["PROMOTE", "HOLD", "REJECT"]


_FIGURES = ("metrics", "per_class", "slices", "sets")
"""Fields of an `Evaluation` that hold nothing but figures."""


def _each_number(value: Any, change: Callable[[float], Any]) -> Any:
    """A nested mapping with its floats changed, null among them as NaN; whole numbers stay."""
    if isinstance(value, dict):
        return {key: _each_number(item, change) for key, item in value.items()}
    return change(math.nan if value is None else value) if value is None or isinstance(value, float) else value


class _Record:
    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**value)


@dataclass(frozen=True)
class Trigger(_Record):
    """Why and by whom a DAG run, or a command, was started."""

    dag_id: str
    dag_run_id: str
    run_type: str
    """manual, scheduled or asset_triggered."""
    by: str
    reason: str
    url: str = ""
    """Where Airflow shows the run; empty where there is none."""


@dataclass(frozen=True)
class Lineage(_Record):
    """What an artifact came from; a few kB, passed between tasks in place of data."""

    data: str
    """Text of data.dvc."""
    lock: str
    """Text of dvc.lock, this prompt's sections only; empty before the first stage."""
    overrides: dict[str, Any]
    """Dotted prompt fields that the run replaced."""
    commit: str
    """Code commit, or "unknown" without git."""
    dirty: bool
    """Whether the checkout held uncommitted changes."""
    environment: str
    """sha256 of requirements.lock."""
    revision: int = -1
    """Number of the dataset ledger's entry that `data` came from."""
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> the machine that executed it (see `retune.machine`), and the `seconds` that it took there; a tuning that was interrupted
    counts from its last checkpoint."""


@dataclass(frozen=True)
class Evaluation(_Record):
    """One release on one test split: the aggregates (per-row results stand in predictions.parquet)."""

    release: str
    """Release id."""
    rows: int
    test_sha256: str
    """Hash over ordered row ids and references: equal only for the same test rows in the same order."""
    evaluator: str
    """Hash of the evaluation code."""
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """Label -> precision, recall, f1, rows."""
    slices: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Slice column -> value -> metrics and rows."""
    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    """Labelled set or probe -> metrics and rows; of a probe `changed` too, the share of rows with another output than unchanged."""
    signatures: dict[str, str] = field(default_factory=dict)
    """Metric -> how it was computed, in its library's own words (bleu, chrf)."""

    def to_json(self) -> dict[str, Any]:
        """A figure that is no finite number becomes null: JSON has none, and Airflow hands none on."""
        plain: dict[str, Any] = _each_number(super().to_json(), lambda value: value if math.isfinite(value) else None)
        return plain

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """null becomes NaN, which the gate refuses."""
        return cls(**{name: _each_number(part, float) if name in _FIGURES else part for name, part in value.items()})


@dataclass(frozen=True)
class Measured(_Record):
    """What was timed, or costs, of one release. No stage's output holds it: it differs from run to run."""

    latency_p50_ms: float
    """Median of the milliseconds of one prediction of one row."""
    latency_p95_ms: float
    tokens_per_second: float
    """Input and output tokens over the seconds of those predictions."""
    tuned_parameters: int
    """Values that were tuned; 0 for the template alone."""
    tune_seconds: float
    """Of the stage that made the release, on the machine that executed it; NaN where that is not known."""
    cost: float | None
    """tune_seconds at RETUNE_DEVICE_HOUR_PRICE; None without a price."""


@dataclass(frozen=True)
class CheckResult(_Record):
    """One of the prompt tests in `prompts/<prompt>.checks.yaml`, as a release met it."""

    name: str
    required: bool
    passed: bool
    reason: str
    """What was expected and what came, in one sentence."""


@dataclass(frozen=True)
class Comparison(_Record):
    """Paired difference, candidate minus champion, in the direction in which higher is better."""

    metric: str
    candidate: float
    champion: float
    gain: float
    low: float
    """Lower end of the one-sided confidence interval of the gain at `confidence`."""
    high: float
    """Upper end, likewise."""
    p_better: float
    """Chance of such a gain or a larger one if both were equally good."""
    p_worse: float
    """Chance of such a gain or a smaller one."""
    confidence: float
    """Of this one comparison: of a policy's confidence, the share that a look has."""
    resamples: int
    rows: int
    won: int = 0
    """Rows that the candidate alone has right (texts: to the letter)."""
    lost: int = 0
    """Rows that the champion alone has right."""
    won_low: float = 0.0
    """Effect size: of the rows on which the two differ, the candidate's share. Lower end of its exact interval at `confidence`."""
    won_high: float = 1.0
    """Upper end, likewise."""
    mcnemar: float = 1.0
    """Exact two-sided p-value of McNemar's test on those rows."""


@dataclass(frozen=True)
class Gate(_Record):
    name: str
    passed: bool
    reason: str
    """One sentence for a person, with the figures."""
    value: float | None = None
    threshold: float | None = None
    low: float | None = None
    high: float | None = None
    on_fail: Verdict = "HOLD"
    """What a failure of this gate turns the verdict into."""


@dataclass(frozen=True)
class Decision(_Record):
    verdict: Verdict
    reasons: list[str]
    gates: list[dict[str, Any]]
    """Each a `Gate` as JSON."""
    comparison: dict[str, Any] | None
    """A `Comparison` as JSON; None where none could be made."""
    ask: bool = False
    """Whether a PROMOTE must be approved by a person whatever the prompt file says: the base model is another than the champion's."""
