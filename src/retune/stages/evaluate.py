"""Stage evaluate: a release and the test split in, a prediction per row and the metrics out.

Reads::

    artifacts/<prompt>/dataset/test.parquet
    artifacts/<prompt>/release/    template, labels and generation settings come from its own prompt.yaml
    artifacts/<prompt>/prompt.yaml labels, slices and `evaluate` of today
    labelled sets, encoder         as `evaluate` names them, verified by hash

Writes::

    artifacts/<prompt>/predictions.parquet   columns: `retune.evaluation.predictions`
    artifacts/<prompt>/probes.parquet        the same of labelled sets and probes, and `set`, `of` (id of the row as it was), input fields
    artifacts/<prompt>/metrics.json          an `Evaluation`

Holds no time or host: what is timed is measured elsewhere. Raises: IntegrityError if the release, its base model or a labelled set is not
what was recorded. Retry: safe.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from retune.config import Prompt
from retune.evaluation.labelled import read_labelled
from retune.evaluation.metrics import evaluate
from retune.evaluation.predictions import fit_labels
from retune.evaluation.probes import probes_of
from retune.inference.base_model import BaseModel, open_base_model
from retune.inference.predictor import Predictor
from retune.inference.release import read_release
from retune.inference.texts import similarities, text_nats
from retune.policy import BaseModelRef
from retune.stages import code_sha256, run_stage


def main(prompt: Prompt) -> None:
    artifacts = Path(f"artifacts/{prompt.name}")
    folders = [Path(p) for p in os.environ.get("RETUNE_BASE_MODELS", "").split(os.pathsep) if p]

    def opened(model: BaseModelRef) -> BaseModel:
        return open_base_model(model, Path.cwd(), folders)

    test = pd.read_parquet(artifacts / "dataset/test.parquet")
    release = read_release(artifacts / "release")
    base = opened(release.prompt.base_model)
    predictor = Predictor.of(release, base)
    encoder = opened(prompt.evaluate.encoder) if prompt.evaluate.encoder and prompt.task == "generation" else None

    def answers(rows: pd.DataFrame, by: Predictor = predictor) -> pd.DataFrame:
        return _answers(prompt, by, rows.reset_index(drop=True), base, encoder)

    predictions = answers(test)
    probes = _probes(prompt, predictor, test, answers)
    evaluation = evaluate(predictions, prompt, release.id, code_sha256("evaluate", prompt.name), probes)
    predictions.to_parquet(artifacts / "predictions.parquet", index=False)
    probes.to_parquet(artifacts / "probes.parquet", index=False)
    (artifacts / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1, sort_keys=True), "utf-8")
    print("  ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items()), flush=True)


def _answers(prompt: Prompt, predictor: Predictor, rows: pd.DataFrame, base: BaseModel, encoder: BaseModel | None) -> pd.DataFrame:
    """What the release says of rows, as a predictions frame."""
    known = rows.reindex(columns=["id", "group", *prompt.slices, prompt.target]).rename(columns={prompt.target: "target"})
    if prompt.task == "classification":
        return pd.concat([known, fit_labels(predictor.predict(rows), list(prompt.labels))], axis=1)
    texts, truncated = zip(*predictor.write(rows), strict=True)
    answers = known.assign(prediction=pd.Series(texts, dtype="str"), truncated=truncated)
    references = rows.assign(**{predictor.prompt.target: rows[prompt.target]})  # the field's name of then
    answers["reference_nats"], answers["reference_tokens"] = predictor.reference_losses(references)
    if base.family == "decoder":
        answers["output_nats"], answers["output_tokens"] = text_nats(base, texts)
    if encoder is not None:
        inputs = rows[list(prompt.inputs)].agg("\n".join, axis=1)
        answers["relevance"] = similarities(encoder, list(inputs), texts)
    return answers


def _probes(prompt: Prompt, predictor: Predictor, test: pd.DataFrame, answers: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    """Predictions of the labelled sets and probes, one under the other."""
    parts = []
    for name, labelled in prompt.evaluate.test_sets.items():
        rows = read_labelled(name, labelled, prompt, Path.cwd())
        parts.append(answers(rows).assign(set=name, of=None, **rows[list(prompt.inputs)]))
    for name, template, rows in probes_of(test, prompt):
        said = answers(rows, predictor.reworded(template) if template else predictor)
        fields = rows.reset_index(drop=True)[["of", *prompt.inputs]]
        parts.append(said.assign(set=name, **fields))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"set": []})


if __name__ == "__main__":
    run_stage(main)
