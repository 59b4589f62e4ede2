"""MLflow model versions and aliases: a projection of the ledger. One version per release, whatever is retried."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.signature import ModelSignature
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

from retune.config import Prompt
from retune.errors import IntegrityError
from retune.inference.requirements import requirements

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

__all__ = ["CHAMPION", "PREVIOUS", "Registry"]

CHAMPION, PREVIOUS = "champion", "previous"
CARD = "README.md"
RELEASE = "retune.release"
"""Tag of a model version: the release id it holds."""
PROJECTED = "retune.champion"
"""Tag of the registered model: the version that Retune last made the champion. The alias differs where a person moved it."""
BARRED = "retune.barred"
"""Tag of a version that a rollback left: why."""
CODE = ("__init__.py", "config.py", "errors.py", "policy.py", "text.py", "inference")
"""Parts of the package that travel with a version; enough to predict where Retune is not installed."""


class Registry:
    """The versions of one prompt's registered model."""

    def __init__(self, uri: str, prompt: str) -> None:
        self.uri = uri
        self.prompt = prompt
        self.client = MlflowClient(tracking_uri=uri)

    def find(self, release: str) -> ModelVersion | None:
        """The version that holds a release. Raises IntegrityError if it is not READY."""
        found = self.client.search_model_versions(f"name = '{self.prompt}' and tags.`{RELEASE}` = '{release}'")
        if not found:
            return None
        version = min(found, key=lambda v: int(v.version))
        if version.status != "READY":
            raise IntegrityError(f"version {version.version} of {self.prompt} is {version.status}: delete it in MLflow, then run again")
        return version

    def register(self, prompt: Prompt, release: str, folder: Path, run_id: str, tags: Mapping[str, str]) -> str:
        """Version number of the release, registered if it is not yet. `folder` is the verified release folder."""
        if version := self.find(release):
            return str(version.version)
        model = self._logged(release, run_id) or self._log(prompt, release, folder, run_id)
        logged = self.client.get_logged_model(model.model_id)
        if logged.status != LoggedModelStatus.READY:
            raise IntegrityError(f"MLflow's model {model.model_id} is {logged.status}, not READY; is its disk full? Run again when mended")
        try:
            self.client.create_registered_model(self.prompt, description=prompt.description or None)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(
            self.prompt,
            source=f"models:/{model.model_id}",
            run_id=run_id,
            model_id=model.model_id,
            tags={**tags, RELEASE: release},
            description=f"Release {release[:12]} of prompt {self.prompt}",
        )
        found = self.find(release)
        if found is None or int(found.version) > int(version.version):
            raise IntegrityError(f"version {version.version} of {self.prompt} does not read back from MLflow by its release {release[:12]}")
        if int(found.version) < int(version.version):  # somebody else registered the release at the same moment: theirs came first
            self.client.delete_model_version(self.prompt, str(version.version))
        return str(found.version)

    def _logged(self, release: str, run_id: str) -> Any:
        """The model of a release that an earlier try logged whole, and was killed before it made a version of it."""
        experiment = self.client.get_run(run_id).info.experiment_id
        logged = self.client.search_logged_models(
            [experiment], filter_string=f"source_run_id = '{run_id}' AND tags.`{RELEASE}` = '{release}'"
        )
        return next((model for model in logged if model.status == LoggedModelStatus.READY), None)

    def _log(self, prompt: Prompt, release: str, folder: Path, run_id: str) -> Any:
        columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, name) for name in prompt.inputs]
        predictions: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "prediction")]
        predictions += [ColSpec(DataType.double, f"p_{label}") for label in prompt.labels]
        package = Path(__file__).parent
        with tempfile.TemporaryDirectory(prefix="retune-model-") as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = Path(scratch) / "retune"
            code.mkdir()
            for name in CODE:
                source = package / name
                if source.is_dir():
                    shutil.copytree(source, code / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copyfile(source, code / name)
            mlflow.set_tracking_uri(self.uri)
            # Else the model would be filed under MLflow's default experiment, and its files with that one's.
            mlflow.set_experiment(experiment_id=self.client.get_run(run_id).info.experiment_id)
            return Model.log(
                None,
                flavor=mlflow.pyfunc,
                name=self.prompt,
                run_id=run_id,
                tags={RELEASE: release},
                python_model=str(package / "inference/pyfunc_model.py"),
                artifacts={"release": str(folder)},
                code_paths=[str(code)],
                pip_requirements=requirements(),
                signature=ModelSignature(inputs=Schema(columns), outputs=Schema(predictions)),
            )

    def describe(self, version: str, card: "ModelCard") -> str:
        """Puts a model card on a version's page, and as README.md beside its files, of which no hash is checked there but the release's
        own; returns the id of its logged model, by which metrics find it."""
        self.client.update_model_version(self.prompt, version, description=card.text.strip())
        model = str(self.client.get_model_version(self.prompt, version).source).removeprefix("models:/")
        with tempfile.TemporaryDirectory(prefix="retune-card-") as scratch:
            card.save(Path(scratch) / CARD)
            self.client.log_model_artifact(model, str(Path(scratch) / CARD))
        return model

    def empty(self, version: ModelVersion, why: str) -> None:
        """Deletes the files of a version, which stays as a record, its page saying why."""
        model = self.client.get_logged_model(str(version.source).removeprefix("models:/"))
        get_artifact_repository(model.artifact_location).delete_artifacts()  # type: ignore[no-untyped-call]
        self.client.update_model_version(self.prompt, version.version, description=why)

    def alias(self, name: str) -> ModelVersion | None:
        try:
            return self.client.get_model_version_by_alias(self.prompt, name)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def projected(self) -> str | None:
        """Version that the alias `champion` was last pointed at by Retune; None before the first time."""
        try:
            tags: Mapping[str, str] = self.client.get_registered_model(self.prompt).tags
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return tags.get(PROJECTED)

    def bar(self, version: str, reason: str | None) -> None:
        """Shows on a version why it is barred; None: it is not any more."""
        if reason is not None:
            self.client.set_model_version_tag(self.prompt, version, BARRED, reason)
        elif BARRED in self.client.get_model_version(self.prompt, version).tags:
            self.client.delete_model_version_tag(self.prompt, version, BARRED)

    def project(self, champion: str, previous: str | None) -> None:
        """Points the aliases at the ledger's champion and previous versions, and reads them back."""
        for name, version in ((PREVIOUS, previous), (CHAMPION, champion)):
            if version is None:
                continue
            current = self.alias(name)
            if current is None or str(current.version) != version:
                self.client.set_registered_model_alias(self.prompt, name, version)
            current = self.alias(name)
            if current is None or str(current.version) != version:
                raise IntegrityError(f"alias {name} of {self.prompt} must read back as version {version}; set it in MLflow or run again")
        self.client.set_registered_model_tag(self.prompt, PROJECTED, champion)

    def predict(self, reference: str, frame: pd.DataFrame, base_models: tuple[Path, ...]) -> pd.DataFrame:
        """Loads a version (`@ALIAS` or `/VERSION`) as any MLflow user would, and predicts from the frame's input columns."""
        mlflow.set_tracking_uri(self.uri)
        os.environ.setdefault("RETUNE_BASE_MODELS", os.pathsep.join(map(str, base_models)))
        model = mlflow.pyfunc.load_model(f"models:/{self.prompt}{reference}")
        inputs = model.metadata.get_input_schema()
        result: pd.DataFrame = model.predict(frame[inputs.input_names()] if inputs else frame)
        return result
