import typing

import pandas as pd
import pytest
import tiny
import torch

from retune.config import Tune
from retune.errors import BadInputError, ConfigError
from retune.inference.predictor import Predictor
from retune.inference.release import read_release, write_release
from retune.prompt_tuning import METHODS, tune

TRAIN, VALIDATION = tiny.make_rows(48, 0), tiny.make_rows(24, 1)
SETTINGS = {"num_virtual_tokens": 4, "learning_rate": 0.05, "epochs": 4, "batch_size": 8, "validate_every": 6}


def test_every_method_of_a_prompt_file_is_there():
    assert {*METHODS, "few_shot", "none"} == set(typing.get_args(Tune.model_fields["method"].annotation))


def test_a_tuned_release_beats_the_template_alone_and_repeats_byte_for_byte(llama, tmp_path):
    prompt = tiny.make_prompt(tune=SETTINGS)
    ids = []
    for name in "ab":
        result = tune(llama, prompt, TRAIN, VALIDATION)
        ids.append(write_release(tmp_path / name, prompt, result.best, llama, {}))
    assert ids[0] == ids[1]
    tuned = Predictor.of(read_release(tmp_path / "a"), llama)
    alone = Predictor(llama, prompt, {})
    assert tuned.perplexity(VALIDATION) < 0.5 * alone.perplexity(VALIDATION)
    assert tuned.perplexity(VALIDATION) == pytest.approx(torch.tensor(result.best_validation_loss).exp().item(), rel=1e-4)


def test_validation_is_on_every_reference(llama):
    prompt = tiny.make_summary_prompt(tune={"method": "none"})
    rows = [{"text": "broken router", "summary": "late\nlate refund"}]
    each = [{"text": "broken router", "summary": text} for text in ("late", "late refund")]
    assert tune(llama, prompt, TRAIN, rows).best_validation_loss == tune(llama, prompt, TRAIN, each).best_validation_loss


def test_rows_may_come_as_a_table(llama):
    prompt = tiny.make_prompt(tune=SETTINGS | {"epochs": 1})
    one, two = tune(llama, prompt, TRAIN, VALIDATION), tune(llama, prompt, pd.DataFrame(TRAIN), pd.DataFrame(VALIDATION))
    assert torch.equal(one.best["prompt_embeddings"], two.best["prompt_embeddings"])


def test_generation_is_tuned_on_its_target(llama):
    result = tune(llama, tiny.make_summary_prompt(tune=SETTINGS), TRAIN, VALIDATION)
    assert result.best_validation_loss < result.initial_validation_loss


def test_method_none_measures_the_template_alone(llama):
    prompt = tiny.make_prompt(tune={"method": "none"})
    result = tune(llama, prompt, [], VALIDATION)
    assert (result.best, result.curve, result.steps, result.best_step) == ({}, [], 0, 0)
    expected = torch.tensor(Predictor(llama, prompt, {}).perplexity(VALIDATION)).log().item()
    assert result.best_validation_loss == result.initial_validation_loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("train", "validation", "split"), [([], VALIDATION, "train"), (TRAIN, [], "validation")])
def test_an_empty_split_is_named(llama, train, validation, split):
    with pytest.raises(BadInputError, match=f"ticket_priority: the {split} split is empty"):
        tune(llama, tiny.make_prompt(), train, validation)


def test_a_row_that_cannot_be_used_is_named_with_its_split(llama):
    with pytest.raises(BadInputError, match="ticket_priority: validation split: row 1: label must be one of"):
        tune(llama, tiny.make_prompt(), TRAIN, [TRAIN[0], {"text": "x", "label": "?"}])


def test_threads_come_from_the_environment(llama, monkeypatch):
    monkeypatch.setenv("RETUNE_THREADS", "2")
    tune(llama, tiny.make_prompt(tune={"method": "none"}), [], VALIDATION)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("RETUNE_THREADS", "many")
    with pytest.raises(ConfigError, match="RETUNE_THREADS"):
        tune(llama, tiny.make_prompt(tune={"method": "none"}), [], VALIDATION)
