"""MLflow runs: one per DAG run, with a nested run per trial; found by key and reopened on retry, so that a retry doubles nothing."""

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from retune.config import sha256_json

__all__ = ["Tracker", "log_curve"]

KEY = "retune.key"
"""Tag that identifies a run: the hash of its key (which may hold quotes). The same key never gets a second run."""
TABLE_ROWS = 1000
"""Rows of a table that MLflow's page shows; the whole stands in the Parquet artifact."""


def log_curve(client: MlflowClient, run_id: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes curve rows (step and metric columns; empty ones left out) as one batch per 500 metrics."""
    metrics = [
        Metric(name, float(value), int(float(row.get("time", 0)) * 1000), int(row["step"]))
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time") and value is not None and value == value and value != ""
    ]
    for start in range(0, len(metrics), 500):
        client.log_batch(run_id, metrics=metrics[start : start + 500])


class Tracker:
    """The runs of one prompt's experiment.

    Every method raises MlflowException if the server cannot be reached after MLflow's own retries.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = experiment

    def experiment_id(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found:
            return found.experiment_id
        # Without a server MLflow would put artifacts under the working directory, which is another one in every process.
        database = self.client.tracking_uri.removeprefix("sqlite:///")
        local = database != self.client.tracking_uri
        place = (Path(database).parent / "mlartifacts").as_uri() if local else None
        return self.client.create_experiment(self.experiment, place, tags={"mlflow.experimentKind": "custom_model_development"})

    def find(self, key: str) -> Run | None:
        """The run with this key, whatever its state."""
        tagged = f"tags.`{KEY}` = '{sha256_json(key)}'"
        runs = self.client.search_runs([self.experiment_id()], tagged, max_results=1, order_by=["attribute.start_time ASC"])
        return runs[0] if runs else None

    def computed(self, release: str, besides: str) -> str | None:
        """Id of the trial run that executed the stage which made this release, not the one that restored it; None if it is gone."""
        made = f"tags.`retune.release` = '{release}' and tags.`retune.restored` = 'false'"
        runs = self.client.search_runs([self.experiment_id()], made, max_results=2, order_by=["attribute.start_time ASC"])
        return next((str(run.info.run_id) for run in runs if run.info.run_id != besides), None)

    def open(self, key: str, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Id of the run with this key, created or reopened, in state RUNNING."""
        all_tags = {**tags, KEY: sha256_json(key), **({"mlflow.parentRunId": parent} if parent else {})}
        if run := self.find(key):
            self.client.update_run(run.info.run_id, status="RUNNING")
            self.client.log_batch(run.info.run_id, tags=[RunTag(k, v) for k, v in all_tags.items()])
            return str(run.info.run_id)
        return str(self.client.create_run(self.experiment_id(), tags=all_tags, run_name=name).info.run_id)

    def close(self, run_id: str, status: str = "FINISHED") -> None:
        self.client.set_terminated(run_id, status)

    def close_orphans(self, key: str) -> list[str]:
        """Marks runs KILLED that are still RUNNING and belong neither to the run with this key nor to its trials; returns their ids."""
        own = self.find(key)
        running = self.client.search_runs([self.experiment_id()], "attributes.status = 'RUNNING'", max_results=1000)
        orphans = [
            run.info.run_id
            for run in running
            if KEY in run.data.tags and not (own and own.info.run_id in (run.info.run_id, run.data.tags.get("mlflow.parentRunId")))
        ]
        for run_id in orphans:
            self.close(run_id, "KILLED")
        return orphans

    def active(self) -> list[tuple[str, str]]:
        """Id and name of each DAG run's run that is RUNNING; one that was killed is among them until the next run closes it."""
        tops = (run for run in self._search("attributes.status = 'RUNNING'") if KEY in run.data.tags)
        return [(str(run.info.run_id), str(run.info.run_name)) for run in tops if "mlflow.parentRunId" not in run.data.tags]

    def tagged(self, tag: str, values: Iterable[str]) -> list[Run]:
        """Runs whose tag has one of the values."""
        return [run for value in values for run in self._search(f"tags.`{tag}` = '{value}'")]

    def _search(self, condition: str) -> Iterator[Run]:
        """Every run of the experiment that meets it, whatever their number; none where there is no experiment yet."""
        experiment = self.client.get_experiment_by_name(self.experiment)
        token: str | None = None
        while experiment:
            page = self.client.search_runs([experiment.experiment_id], condition, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def delete(self, run_id: str, file: str) -> bool:
        """Removes an artifact, or a folder of them; False if it is not there."""
        folder, _, name = file.rpartition("/")
        found = name in {Path(item.path).name for item in self.client.list_artifacts(run_id, folder or None)}
        if found:
            get_artifact_repository(self.client.get_run(run_id).info.artifact_uri).delete_artifacts(file)  # type: ignore[no-untyped-call]
        return found

    @contextmanager
    def working(self, run_id: str, done: bool = False) -> Iterator[None]:
        """Marks the run RUNNING, which an earlier try may have left FAILED; FAILED if the block raises, FINISHED at its end if `done`."""
        if self.client.get_run(run_id).info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        try:
            yield
        except BaseException:
            self.close(run_id, "FAILED")
            raise
        if done:
            self.close(run_id)

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Parameters; a nested mapping becomes dotted names. Logging the same value again is allowed, another is MLflow's error."""
        flat = {name: str(value)[:6000] for name, value in _flatten(values)}
        self.client.log_batch(run_id, params=[Param(name, value) for name, value in flat.items()])

    def metrics(self, run_id: str, values: Mapping[str, float], model_id: str | None = None) -> None:
        """Values as of now; of a model too, where one is given: its page then shows them. What stands there is not logged again."""
        there = set(self.client.get_run(run_id).data.metrics.items())
        if model_id is not None:
            there &= {(metric.key, metric.value) for metric in self.client.get_logged_model(model_id).metrics or ()}
        now = int(time.time() * 1000)
        new = [Metric(name, value, now, 0, model_id=model_id) for name, value in values.items() if (name, value) not in there]
        if new:
            self.client.log_batch(run_id, metrics=new)

    def tags(self, run_id: str, values: Mapping[str, Any]) -> None:
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        self.client.log_batch(run_id, tags=[RunTag(name, text[:8000]) for name, text in texts.items()])

    def dataset(self, run_id: str, name: str, digest: str, source: Mapping[str, Any], rows: int, context: str) -> None:
        """DVC's digest as a dataset input (MLflow's own digest sees the first 10,000 rows only)."""
        entity = Dataset(
            name=name, digest=digest[:36], source_type="dvc", source=json.dumps(source), schema=None, profile=json.dumps({"num_rows": rows})
        )
        self.client.log_inputs(run_id, datasets=[DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def curve(self, run_id: str, rows: list[dict[str, Any]]) -> None:
        """Logs what of the curve is not there yet: a stage that ran has streamed it, or parts of it where MLflow was away or the stage was
        killed; a restored one has not."""
        names = {name for row in rows for name in row} - {"step", "time"}
        there = {(name, point.step) for name in names for point in self.client.get_metric_history(run_id, name)}
        missing = ({k: v for k, v in row.items() if (k, int(row["step"])) not in there} for row in rows)
        log_curve(self.client, run_id, missing)

    def text(self, run_id: str, text: str, file: str) -> None:
        self.client.log_text(run_id, text, file)

    def json(self, run_id: str, value: Any, file: str) -> None:
        self.client.log_dict(run_id, value, file)

    def file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(run_id, str(path), folder)

    def artifacts(self, run_id: str, folder: str) -> dict[str, bytes]:
        """Content of the files that stand in a folder of a run's artifacts, by path, not those in folders below it."""
        with tempfile.TemporaryDirectory(prefix="retune-artifacts-") as scratch:
            files = [file.path for file in self.client.list_artifacts(run_id, folder) if not file.is_dir]
            return {file: Path(self.client.download_artifacts(run_id, file, scratch)).read_bytes() for file in files}

    def curves(self, run_id: str) -> dict[str, list[dict[str, Any]]]:
        """Validation loss by step of each trial of a run, by the trial's name."""
        nested = f"tags.`mlflow.parentRunId` = '{run_id}'"
        trials = self.client.search_runs([self.experiment_id()], nested, max_results=1000, order_by=["attribute.start_time ASC"])
        return {
            str(trial.info.run_name).removeprefix("trial "): [
                {"step": metric.step, "validation_loss": metric.value}
                for metric in sorted(self.client.get_metric_history(trial.info.run_id, "validation_loss"), key=lambda metric: metric.step)
            ]
            for trial in trials
        }

    def figure(self, run_id: str, png: bytes, file: str, scratch: Path) -> None:
        path = scratch / Path(file).name
        path.write_bytes(png)
        parent = Path(file).parent.as_posix()
        self.client.log_artifact(run_id, str(path), None if parent == "." else parent)

    def table(self, run_id: str, frame: pd.DataFrame, file: str) -> None:
        """The first rows as a table that MLflow's page shows; `file` ends in .json."""
        head = frame.head(TABLE_ROWS)
        body = {"columns": list(head.columns), "data": json.loads(head.to_json(orient="values"))}
        self.client.log_dict(run_id, body, file)
        self.tags(run_id, {"mlflow.loggedArtifacts": [{"path": file, "type": "table"}]})


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
