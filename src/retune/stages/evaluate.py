"""Stage evaluate: a release and the test split in, a prediction per row and the metrics out.

Reads::

    artifacts/<prompt>/dataset/test.parquet
    artifacts/<prompt>/release/    template, labels and generation settings come from its own prompt.yaml
    artifacts/<prompt>/prompt.yaml labels and slices of today

Writes::

    artifacts/<prompt>/predictions.parquet   columns: `retune.evaluation.predictions`
    artifacts/<prompt>/metrics.json          an `Evaluation`

Holds no time or host: what is timed is measured elsewhere. Raises: IntegrityError if the release or its base model is not what was
recorded. Retry: safe.
"""

import json
import os
from pathlib import Path

import pandas as pd

from retune.config import Prompt
from retune.evaluation.metrics import evaluate
from retune.inference.base_model import open_base_model
from retune.inference.predictor import Predictor
from retune.inference.release import read_release
from retune.stages import code_sha256, run_stage


def main(prompt: Prompt) -> None:
    artifacts = Path(f"artifacts/{prompt.name}")
    test = pd.read_parquet(artifacts / "dataset/test.parquet")
    folders = [Path(p) for p in os.environ.get("RETUNE_BASE_MODELS", "").split(os.pathsep) if p]
    release = read_release(artifacts / "release")
    predictor = Predictor.of(release, open_base_model(release.prompt.base_model, Path.cwd(), folders))
    known = test[["id", "group", *prompt.slices, prompt.target]].rename(columns={prompt.target: "target"})
    predictions = pd.concat([known.reset_index(drop=True), predictor.predict(test).reset_index(drop=True)], axis=1)
    if prompt.task == "generation":
        references = test.assign(**{release.prompt.target: test[prompt.target]})  # the field's name of then
        predictions["reference_nats"], predictions["reference_tokens"] = predictor.reference_losses(references)
    evaluation = evaluate(predictions, prompt, release.id, code_sha256("evaluate", prompt.name))
    predictions.to_parquet(artifacts / "predictions.parquet", index=False)
    (artifacts / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1, sort_keys=True), "utf-8")
    print("  ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items()), flush=True)


if __name__ == "__main__":
    run_stage(main)
