"""Prompt files: one frozen, validated definition per prompt. Light imports only, so that DAG files may read it.

All errors of a file are reported at once, each as `field must be ..., got VALUE (FILE: section)`.
"""

import hashlib
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from retune.errors import ConfigError
from retune.policy import PROBES, TASK_METRICS, BaseModelRef, Evaluate, Policy, Section

__all__ = [
    "LEARNING_RATES",
    "Augmentation",
    "Generation",
    "Preprocess",
    "Prompt",
    "Schedule",
    "Source",
    "Splits",
    "Tune",
    "canonical_json",
    "load_prompt",
    "load_prompts",
    "override",
    "parse_yaml",
    "read_yaml",
    "resolved_yaml",
    "sha256_json",
]

_MAX_YAML = 1 << 20
_MAX_VALUES = 100_000
_SHOWN = 300
"""Characters of a wrong value that a message repeats."""
RELEASED = ("name", "task", "base_model", "template", "target", "labels", "slices", "preprocess", "tune", "generation")
"""Fields of a prompt file that a release is made of: the parameters of stage tune in dvc.yaml."""


class Source(Section):
    """Where new data land, and how to read them where guessing would go wrong."""

    path: str
    """Folder (relative to the project, or one of the machine that ingests by its full path) or s3://bucket/prefix."""
    columns: dict[str, str | int] = {}
    """Prompt field -> column name, or position from 0 in a file without a header. A field left out has its own name as column."""
    header: bool | None = None
    """Whether CSV/TSV files start with a header; None: found out per file."""
    delimiter: Annotated[str | None, Field(min_length=1, max_length=1)] = None
    """One character between CSV fields; None: found out per file."""
    quote: Annotated[str | None, Field(max_length=1)] = None
    """Quote character; an empty string: fields are never quoted; None: found out per file."""
    encoding: str | None = None
    """Text encoding; None: UTF-8 where the bytes are valid UTF-8, else found out per file."""
    max_characters: Annotated[int, Field(ge=1)] = 20_000
    """A longer text is quarantined."""
    max_record_characters: Annotated[int, Field(ge=1_000)] = 1_000_000
    """A longer line or record is quarantined, whatever stands in it."""
    max_columns: Annotated[int, Field(ge=1)] = 1_000
    """A file with more columns is refused."""
    max_expansion: Annotated[float, Field(ge=1)] = 100.0
    """A gzip or Parquet file that holds more than this many times its own size, and 64 MiB, is refused."""

    @field_validator("path")
    @classmethod
    def _a_place(cls, value: str) -> str:
        if ".." in value.split("/") or not value.isprintable() or ("://" in value and not value.startswith("s3://")):
            raise ValueError("must be a folder without .. in its path, or s3://bucket/prefix")
        return value


class Schedule(Section):
    """When the prompt is retrained: either trigger suffices."""

    cron: str | None = None
    """Five-field cron expression, UTC."""
    on_new_data: bool = True
    """Run when a dataset revision changes this prompt's data."""
    min_new_rows: Annotated[int, Field(ge=0)] = 0
    """Rows kept since the last decided revision, below which a run ends after its first task."""


class Splits(Section):
    """Shares of the rows, by frozen hash bucket; they add up to 1."""

    train: Annotated[float, Field(gt=0, lt=1)] = 0.6
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.15
    test: Annotated[float, Field(gt=0, lt=1)] = 0.25
    salt: str = ""
    """Another word draws other splits with the same shares: releases tuned under the old ones are no longer compared with."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError(f"must add up to 1, got {self.train} + {self.validation} + {self.test}")
        return self


class Augmentation(Section):
    """Noisy copies of training rows (typos, case, spacing); validation and test rows are never touched."""

    copies: Annotated[int, Field(ge=0, le=10)] = 0
    """Noisy copies per training row."""
    seed: int = 0


class Preprocess(Section):
    min_characters: Annotated[int, Field(ge=1)] = 1
    """A shorter text is quarantined."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Tokens of the text that the model sees; the rest is cut, and counted in the profile."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Jaccard similarity of word 3-grams from which two texts count as near-duplicates."""
    splits: Splits = Splits()
    augmentation: Augmentation = Augmentation()


Method = Literal["prompt_tuning", "p_tuning", "prefix_tuning", "lora", "ia3", "full", "few_shot", "none"]
LEARNING_RATES: dict[str, float] = {"p_tuning": 0.003, "prefix_tuning": 0.03, "lora": 0.001, "ia3": 0.03, "full": 0.0003}
"""Method -> its learning rate where a prompt file names none; of all others the field's default."""


class Tune(Section):
    method: Method = "prompt_tuning"
    """What is tuned: a soft prompt (prompt_tuning, p_tuning), keys and values of every layer (prefix_tuning), small matrices (lora) or
    vectors (ia3) beside the frozen weights, all weights (full), or nothing (few_shot: training rows stand before each input; none: the
    template alone)."""
    num_virtual_tokens: Annotated[int, Field(ge=1, le=1000)] = 20
    """P, rows of the soft prompt or prefix."""
    init: Literal["text", "sampled_vocabulary", "random"] = "sampled_vocabulary"
    """Where prompt_tuning and prefix_tuning start."""
    init_text: str | None = None
    """Words whose embeddings start the soft prompt (init: text); repeated or cut to P tokens."""
    encoder_hidden_size: Annotated[int | None, Field(ge=1)] = None
    """Width of p_tuning's network; None: the base model's."""
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank of each of lora's matrices."""
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    """lora's matrices count alpha / rank times."""
    target_modules: Annotated[tuple[str, ...] | None, Field(min_length=1)] = None
    """Names of the linear layers that lora and ia3 change, such as q_proj; None: PEFT's choice for the base model's type."""
    examples: Annotated[int, Field(ge=1, le=32)] = 4
    """Training rows that few_shot puts before each input, those most like it."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    """Left out: that of the method (see LEARNING_RATES). Overriding the method alone changes it too."""
    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimizer step."""
    batch_tokens: Annotated[int | None, Field(ge=1)] = None
    """Tokens per optimizer step, in place of batch_size: as many rows as they hold, at least one. Prompt and answer count, and virtual
    tokens too on an encoder or encoder-decoder, where each row has its own. None: batch_size rows, whatever their length."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Optimizer steps of linear warm-up; the rate then falls linearly to 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    validate_every: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps between passes over the validation split."""
    patience: Annotated[int | None, Field(ge=1)] = None
    """Passes over the validation split without a better loss after which a run ends; None: it goes to its last epoch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the frozen model's weights while it tunes. bf16 halves their memory and rounds: the gradient was off by 2 to 7 %. It is faster on
    GPUs and on CPUs that are faster in bf16; on others products are computed in fp32."""
    seed: Annotated[int, Field(ge=0)] = 13

    @model_validator(mode="before")
    @classmethod
    def _rate_of_method(cls, raw: Any) -> Any:
        """Writes the method's own learning rate into a section that names none."""
        rate = LEARNING_RATES.get(str(raw.get("method"))) if isinstance(raw, dict) else None
        return raw if rate is None or "learning_rate" in raw else {**raw, "learning_rate": rate}

    @model_validator(mode="after")
    def _fits_method(self) -> Self:
        if self.method not in ("few_shot", "none") and self.init == "text" and not self.init_text:
            raise ValueError("init: text needs init_text, the words that the soft prompt starts from")
        if self.method == "full" and self.precision != "fp32":
            raise ValueError(f"precision must be fp32 for method: full, whose steps are too small for {self.precision} weights")
        return self


class Generation(Section):
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""


def fields_of(template: str) -> tuple[str, ...]:
    """Fields that a template names, in order of first appearance. Raises ValueError if it holds anything but text and plain fields."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"must be text with fields in braces: {error}") from None
    for _, field, spec, conversion in parts:
        if field is not None and (not field.isidentifier() or spec or conversion):
            raise ValueError(f"may only hold plain fields such as {{text}}, got {{{field}}}")
    return tuple(dict.fromkeys(field for _, field, _, _ in parts if field))


class Prompt(Section):
    """A prompt file, every default written out."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
    description: str = ""
    owner: str = ""
    intended_use: str = ""
    task: Literal["classification", "generation"]
    base_model: BaseModelRef
    source: Source = Source(path="")
    schedule: Schedule = Schedule()
    template: str
    """Text with `{text}` and any other input column in braces; no format specs, no attribute access."""
    target: str
    """Prompt field that holds the answer."""
    labels: dict[str, str] = {}
    """Label -> its words, as the model writes them after the template (mostly with a leading space)."""
    slices: dict[str, tuple[str, ...] | None] = {}
    """Slice column -> allowed values (None: any)."""
    preprocess: Preprocess = Preprocess()
    tune: Tune = Tune()
    generation: Generation = Generation()
    trials: tuple[dict[str, Any], ...] = ({},)
    """Overrides, one tuning run each."""
    evaluate: Evaluate = Evaluate()
    promote: Policy = Policy()

    @model_validator(mode="before")
    @classmethod
    def _metric_of_task(cls, raw: Any) -> Any:
        """Writes the task's own metric into a policy that names none."""
        policy = raw.get("promote", {}) if isinstance(raw, dict) else None
        if not isinstance(policy, dict) or "metric" in policy or raw.get("task") not in TASK_METRICS:
            return raw
        return {**raw, "promote": {**policy, "metric": TASK_METRICS[raw["task"]][0]}}

    @field_validator("source", mode="before")
    @classmethod
    def _source_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("slices", mode="before")
    @classmethod
    def _slice_names(cls, value: Any) -> Any:
        return dict.fromkeys(value) if isinstance(value, list | tuple) else value

    @field_validator("template")
    @classmethod
    def _plain_template(cls, value: str) -> str:
        fields_of(value)
        return value

    @property
    def inputs(self) -> tuple[str, ...]:
        """Fields that the template names, in order of first appearance."""
        return fields_of(self.template)

    def released(self) -> Self:
        """The prompt with only what a release is made of and serves with; everything else at its default."""
        fields = {name: getattr(self, name) for name in RELEASED} | {"promote": Policy(metric=TASK_METRICS[self.task][0])}
        return type(self).model_construct(**fields)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.inputs:
            raise ValueError("template must name an input field, such as {text}")
        if self.target in self.inputs:
            raise ValueError(f"template must not name the target {self.target!r}")
        if self.task == "classification" and len(self.labels) < 2:
            raise ValueError(f"labels must name at least 2 labels for task: classification, got {len(self.labels)}")
        if self.task == "generation" and self.labels:
            raise ValueError("labels belong to task: classification; remove them or change the task")
        known = TASK_METRICS[self.task]
        policed = [("metric", self.promote.metric)]
        policed += [(field, name) for field in ("floors", "margins") for name in getattr(self.promote, field)]
        for field, metric in policed:
            if metric not in known:
                raise ValueError(f"promote.{field} must name one of {', '.join(known)} for task: {self.task}, got {metric!r}")
            if metric == "relevance" and self.evaluate.encoder is None:
                raise ValueError(f"promote.{field} names relevance, which needs evaluate.encoder, a sentence encoder")
        for name in self.promote.slice_floors:
            column, _, _ = name.partition("=")
            if column not in self.slices and name not in {f"set={known}" for known in (*self.evaluate.test_sets, *PROBES)}:
                raise ValueError(f"promote.slice_floors must name a slice as COLUMN=VALUE or a set as set=NAME, got {name!r}")
        for template in self.evaluate.probes.templates:
            if set(fields_of(template)) != set(self.inputs):
                raise ValueError(f"evaluate.probes.templates must hold the template's fields {', '.join(self.inputs)}, got {template!r}")
        for trial in self.trials:
            for key in trial:
                section, _, field = key.partition(".")
                if section != "tune" or field not in Tune.model_fields:
                    raise ValueError(f"trials may override tune.*, got {key!r}; known: {', '.join(sorted(Tune.model_fields))}")
        return self


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no white space: the bytes that are hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _build(raw: Any, where: str) -> Prompt:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be a mapping of fields, got {type(raw).__name__}")
    try:
        return Prompt.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            location = ".".join(str(part) for part in item["loc"]) or "prompt"
            value = item["input"]
            got = "" if isinstance(value, dict | BaseModel) else f", got {repr(value)[:_SHOWN]}"
            lines.append(f"{location}: {item['msg'].removeprefix('Value error, ')}{got}")
        raise ConfigError(f"{where}: {len(lines)} error(s)\n  " + "\n  ".join(lines)) from None


def read_yaml(path: Path) -> Any:
    """What a file of plain YAML holds: no Python objects, and not more than its size promises.

    Raises ConfigError for any other file, FileNotFoundError without one.
    """
    _check_size(path.stat().st_size, str(path))
    return parse_yaml(path.read_bytes(), str(path))


def parse_yaml(raw: bytes, where: str) -> Any:
    """What plain YAML says, see `read_yaml`. Raises ConfigError naming `where` for any other text."""
    _check_size(len(raw), where)
    try:
        loader = yaml.SafeLoader(raw.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MAX_VALUES:
            raise ConfigError(f"{where}: must hold at most {_MAX_VALUES:,} values, each alias (*name) counted as what it stands for")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def _check_size(size: int, where: str) -> None:
    if size > _MAX_YAML:
        raise ConfigError(f"{where}: must take at most {_MAX_YAML:,} bytes, got {size:,}")


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, those behind aliases counted each time that they are used. Raises ValueError for a node within itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 0
        inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    elif not known[id(node)]:
        raise ValueError("an alias stands within what it names")
    return known[id(node)]


def load_prompt(path: Path, name: str | None = None) -> Prompt:
    """Reads one prompt file; `name` is the prompt's where the file is not called after it.

    Raises ConfigError with every error of the file at once.
    """
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"no prompt file {path}; the file's name is the prompt's name with .yaml") from None
    prompt = _build(raw, str(path))
    if prompt.name != (name or path.stem):
        raise ConfigError(f"{path}: name must be {name or path.stem!r} as the file says, got {prompt.name!r}")
    if not prompt.source.path:
        raise ConfigError(f"{path}: source must say where new data land: a folder, or s3://bucket/prefix")
    return prompt


def resolved_yaml(prompt: Prompt) -> str:
    """The prompt as a file with every default written out: what stage resolve makes and the other stages read."""
    return yaml.safe_dump(prompt.model_dump(mode="json"), sort_keys=True, allow_unicode=True)


def load_prompts(folder: Path) -> dict[str, Prompt]:
    """Every `*.yaml` of a folder by name, `*.checks.yaml` apart."""
    paths = sorted(p for p in folder.glob("*.yaml") if not p.name.endswith(".checks.yaml"))
    return {path.stem: load_prompt(path) for path in paths}


def override(prompt: Prompt, overrides: Mapping[str, Any]) -> Prompt:
    """The prompt with dotted fields replaced, such as `{"tune.learning_rate": 0.01}`, validated anew. Another tune.method brings its own
    learning rate, unless one is named too.

    Raises ConfigError naming the unknown field or the wrong value.
    """
    raw = prompt.model_dump(mode="json")
    for key, value in overrides.items():
        *sections, field = key.split(".")
        place: Any = raw
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict) or field not in place:
            raise ConfigError(f"{prompt.name}: no field {key!r} to override; dotted names such as tune.learning_rate are known")
        place[field] = value
    if overrides.get("tune.method", prompt.tune.method) != prompt.tune.method and "tune.learning_rate" not in overrides:
        del raw["tune"]["learning_rate"]
    return _build(raw, f"prompt {prompt.name} with overrides {dict(overrides)}")
