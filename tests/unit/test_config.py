"""Prompt files: every error at once, each with field, value and way out; overrides are validated anew."""

import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from retune.config import LEARNING_RATES, RELEASED, Tune, load_prompt, load_prompts, override, resolved_yaml
from retune.errors import ConfigError
from retune.evaluation.metrics import task_metrics
from retune.policy import TASK_METRICS

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "prompts/ticket_priority.yaml"


def write(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "ticket_priority.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(EXAMPLE.read_text("utf-8")) | changes), "utf-8")
    return path


def test_the_examples_load() -> None:
    assert set(load_prompts(ROOT / "prompts")) == {"ticket_priority", "ticket_summary"}


def test_all_errors_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {"tune": {"epochs": 0, "learning_rate": -1}, "colour": "red", "promote": {"metric": "bleurt"}})
    with pytest.raises(ConfigError) as error:
        load_prompt(path)
    message = str(error.value)
    assert "ticket_priority.yaml: 4 error(s)" in message
    for part in ("tune.epochs", "got 0", "tune.learning_rate", "got -1", "colour", "promote.metric", "got 'bleurt'"):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "Ticket: {text.__class__}\nAnswer:"}, "may only hold plain fields"),
        ({"template": "Ticket: {text!r}"}, "may only hold plain fields"),
        ({"template": "Ticket: {text[0]} {text:>99999999}"}, "may only hold plain fields"),
        ({"template": "Ticket: {text} {0.__class__.__init__.__globals__}"}, "may only hold plain fields"),
        ({"evaluate": {"probes": {"templates": ["{text} {text.__class__}"]}}}, "may only hold plain fields"),
        ({"template": "No field"}, "must name an input field"),
        ({"template": "{text} {label}"}, "must not name the target"),
        ({"labels": {"low": " low"}}, "at least 2 labels"),
        ({"base_model": {"path": "examples/base_model"}}, r"either \{path, sha256\} or \{hub, revision\}"),
        ({"base_model": {"hub": "org/name", "revision": "main"}}, "revision"),
        ({"base_model": {"hub": "../../etc", "revision": "a" * 40}}, "base_model.hub"),
        ({"base_model": {"path": "/etc", "sha256": "0" * 64}}, "base_model.path: must be a path inside the project.*got '/etc'"),
        ({"base_model": {"path": "a/../../etc", "sha256": "0" * 64}}, "base_model.path: must be a path inside the project"),
        ({"base_model": {"path": "examples/base_model", "sha256": "0" * 64, "trust_remote_code": True}}, "trust_remote_code: Extra inputs"),
        ({"trust_remote_code": True}, "trust_remote_code: Extra inputs"),
        ({"evaluate": {"test_sets": {"a": {"path": "../secret.csv", "sha256": "0" * 64}}}}, "test_sets.a.path: must be a path inside"),
        ({"evaluate": {"encoder": {"path": "~/model", "sha256": "0" * 64}}}, "encoder.path: must be a path inside"),
        ({"source": "file:///etc"}, "source.path: must be a folder without .. in its path, or s3://bucket/prefix, got 'file:///etc'"),
        ({"source": "../landing"}, "source.path: must be a folder"),
        ({"source": "landing/../../x"}, "source.path: must be a folder"),
        ({"source": "https://example.org/x"}, "source.path: must be a folder"),
        ({"source": "landing\nx"}, "source.path: must be a folder"),
        ({"preprocess": {"splits": {"train": 0.5, "validation": 0.2, "test": 0.2}}}, "must add up to 1"),
        ({"tune": {"init": "text"}}, "init: text needs init_text"),
        ({"trials": [{"preprocess.max_tokens": 3}]}, r"trials may override tune\.\*"),
        ({"promote": {"approval_hours": 0}}, "promote.approval_hours"),
        ({"promote": {"metric": "bleu"}}, r"promote.metric must name one of macro_f1, .* for task: classification, got 'bleu'"),
        ({"promote": {"floors": {"chrf": 9}}}, "promote.floors must name one of .* got 'chrf'"),
        (
            {"task": "generation", "labels": {}, "promote": {"metric": "macro_f1"}},
            "promote.metric must name one of rougeL, .* for task: generation, got 'macro_f1'",
        ),
        ({"name": "other"}, "name must be 'ticket_priority'"),
        ({"source": {"path": ""}}, "source must say where"),
    ],
)
def test_a_contradiction_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_prompt(write(tmp_path, changes))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghijklm")
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: !!python/object/apply:os.system [touch marker]\n", "not valid YAML: could not determine a constructor"),
        ("name: !!python/name:os.environ\n", "not valid YAML: could not determine a constructor"),
        ("name: !include /etc/passwd\n", "not valid YAML: could not determine a constructor"),
        (LAUGHS, "must hold at most 100,000 values, each alias"),
        ("labels: &a {low: *a}\n", "not valid YAML: an alias stands within what it names"),
        ("template: " + "[" * 50_000 + "\n", "not valid YAML"),
        ("description: " + "x" * 2_000_000 + "\n", "must take at most 1,048,576 bytes"),
        ("description: \udcff\n", "not valid YAML"),
    ],
)
def test_a_file_made_to_run_code_or_to_fill_memory_is_refused(tmp_path: Path, text: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ticket_priority.yaml"
    path.write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=message) as error:
        load_prompt(path)
    assert len(str(error.value)) < 1_000
    assert not (tmp_path / "marker").exists()


def test_aliases_of_plain_values_are_read(tmp_path: Path) -> None:
    plain = EXAMPLE.read_text("utf-8")
    path = tmp_path / "ticket_priority.yaml"
    path.write_text(plain.replace("max_tokens: 256", "max_tokens: &most 256").replace("epochs: 8", "epochs: *most"), "utf-8")
    assert load_prompt(path).tune.epochs == 256


def test_what_stands_in_a_template_is_text(monkeypatch: Any) -> None:
    monkeypatch.setenv("PLANTED", "secret")
    template = "$PLANTED {{{{ env.PLANTED }}}} {{% include '/etc/passwd' %}} %(text)s {text}"
    prompt = override(load_prompt(EXAMPLE), {"template": template})
    assert prompt.inputs == ("text",)
    assert prompt.template == template
    assert "secret" not in resolved_yaml(prompt)


def test_a_missing_file_says_which_name_it_should_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt file"):
        load_prompt(tmp_path / "absent.yaml")


def test_an_override_changes_its_field_and_nothing_else() -> None:
    prompt = load_prompt(EXAMPLE)
    changed = override(prompt, {"tune.learning_rate": 0.5})
    assert changed.tune.learning_rate == 0.5
    assert override(changed, {"tune.learning_rate": prompt.tune.learning_rate}) == prompt


@pytest.mark.parametrize("key", ["tune.speed", "nothing.here", "tune", "learning_rate"])
def test_an_unknown_override_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"override|error"):
        override(load_prompt(EXAMPLE), {key: 1})


def test_a_released_prompt_has_only_what_a_release_is_made_of() -> None:
    prompt = load_prompt(EXAMPLE)
    released = prompt.released()
    assert {name: getattr(released, name) for name in RELEASED} == {name: getattr(prompt, name) for name in RELEASED}
    assert (released.description, released.source.path, released.trials) == ("", "", ({},))


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_policies_may_name_every_metric_of_their_task_that_is_better_one_way(task: Literal["classification", "generation"]) -> None:
    assert set(TASK_METRICS[task]) == {metric.name for metric in task_metrics(task) if metric.higher_is_better is not None}


def test_a_policy_without_a_metric_has_its_task_s(tmp_path: Path) -> None:
    generation = {"task": "generation", "labels": {}, "promote": {"min_gain": 0.01}}
    prompt = load_prompt(write(tmp_path, generation))
    assert (prompt.promote.metric, prompt.promote.min_gain) == ("rougeL", 0.01)
    assert prompt.released().promote.metric == "rougeL"
    assert load_prompt(write(tmp_path, {"promote": {}})).promote.metric == "macro_f1"


def test_each_method_has_its_own_learning_rate_unless_one_is_named(tmp_path: Path) -> None:
    prompt = load_prompt(write(tmp_path, {"tune": {"method": "lora"}}))
    assert prompt.tune.learning_rate == LEARNING_RATES["lora"]
    assert override(prompt, {"tune.method": "full"}).tune.learning_rate == LEARNING_RATES["full"]
    assert override(prompt, {"tune.method": "prompt_tuning"}).tune == Tune()
    assert override(prompt, {"tune.method": "full", "tune.learning_rate": 0.5}).tune.learning_rate == 0.5
    kept = override(prompt, {"tune.learning_rate": 0.5})
    assert override(kept, {"tune.method": "lora", "tune.epochs": 1}).tune.learning_rate == 0.5


def test_an_unknown_method_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.method: .*'prompt_tuning', .*'lora'.* got 'lorra'"):
        load_prompt(write(tmp_path, {"tune": {"method": "lorra"}}))
    with pytest.raises(ConfigError, match="precision must be fp32 for method: full"):
        load_prompt(write(tmp_path, {"tune": {"method": "full", "precision": "bf16"}}))
