"""MLflow's "models from code" script of a release: MLflow runs this file when a model version is loaded.

Artifact `release`: the release folder. The base model is not copied into the version; it is looked up by its hash in the folders of
RETUNE_BASE_MODELS (separated like PATH), or by its revision if it is of the hub.
"""

import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from retune.inference.start import collection_paused

with collection_paused():
    from retune.inference.predictor import Predictor

RELEASE = "release"
"""Key of the artifact."""


class RetunePromptModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined, unused-ignore]
    """Input: the prompt's input columns. Output: the same table that `Predictor.predict` returns."""

    _predictor: Predictor

    def load_context(self, context: Any) -> None:
        """Raises IntegrityError if the release is not what was registered, BadInputError (naming the hash) without its base model."""
        folders = [Path(p) for p in os.environ.get("RETUNE_BASE_MODELS", "").split(os.pathsep) if p]
        with collection_paused():  # transformers imports the model's code here
            self._predictor = Predictor.load(Path(context.artifacts[RELEASE]), folders)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002 - MLflow's
        return self._predictor.predict(model_input)


mlflow.models.set_model(RetunePromptModel())
