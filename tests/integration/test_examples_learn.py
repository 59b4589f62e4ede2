"""The examples' promise, over three seeds: a tuned prompt beats the template alone by 0.25 macro-F1, and a new rule makes it worse."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from retune.config import load_prompt, override
from retune.data.ingest import ingest_object
from retune.data.landing import open_objects
from retune.data.parts import read_parts
from retune.data.preprocess import PreprocessResult, preprocess
from retune.evaluation.metrics import evaluate
from retune.inference.base_model import open_base_model
from retune.inference.predictor import Predictor
from retune.prompt_tuning import tune

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
PROMPT = load_prompt(ROOT / "prompts/ticket_priority.yaml")


def revision(batches: list[str], folder: Path) -> PreprocessResult:
    """The splits of the batches landed so far, through the product's own ingest and preprocess."""
    landing = folder / "landing"
    landing.mkdir()
    parts, sequence = [], 0
    for batch in batches:
        for file in sorted((ROOT / "examples/batches/ticket_priority" / batch).iterdir()):
            shutil.copy(file, landing)
        for item in open_objects("landing", root=folder).objects:
            sequence += 1
            result = ingest_object(PROMPT, item, sequence, folder / "parts")
            assert result.part is not None
            parts.append(folder / "parts" / result.part)
        shutil.rmtree(landing)
        landing.mkdir()
    return preprocess(read_parts(parts), PROMPT)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> PreprocessResult:
    return revision(["1"], tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> PreprocessResult:
    return revision(["1", "2"], tmp_path_factory.mktemp("second"))


def macro_f1(predictor: Predictor, test: pd.DataFrame) -> float:
    known = test[["id", "group", *PROMPT.slices]].assign(target=test[PROMPT.target]).reset_index(drop=True)
    return evaluate(pd.concat([known, predictor.predict(test).reset_index(drop=True)], axis=1), PROMPT, "r", "e").metrics["macro_f1"]


def test_there_is_a_reason_to_retrain(first: PreprocessResult, second: PreprocessResult) -> None:
    assert 80 <= len(first.train) <= 130
    assert 300 <= len(second.train) <= 700
    assert len(first.test) > 150
    assert len(second.test) > 600


@pytest.mark.parametrize("seed", [13, 14, 15])
def test_tuned_beats_the_template_alone_until_the_rule_changes(
    first: PreprocessResult, second: PreprocessResult, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETUNE_THREADS", "2")
    prompt = override(PROMPT, {"tune.seed": seed})
    base = open_base_model(prompt.base_model, ROOT)
    alone = Predictor(base, prompt, None)
    tuned = Predictor(base, prompt, tune(base, prompt, first.train, first.validation).soft_prompt)
    before, after = macro_f1(alone, first.test), macro_f1(tuned, first.test)
    later = macro_f1(tuned, second.test)
    print(f"seed {seed}: template alone {before:.3f}, tuned {after:.3f}, tuned after the rule changed {later:.3f}")
    assert after >= before + 0.25
    assert later < after - 0.05
