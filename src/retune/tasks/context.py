"""What the tasks of a retrain run share."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from retune.config import Prompt
from retune.errors import IntegrityError
from retune.ledger import Entry, Ledger, standing
from retune.records import Lineage
from retune.settings import Settings
from retune.workspace import Workspaces

if TYPE_CHECKING:
    import pandas as pd

    from retune.registry import Registry
    from retune.tracking import Tracker

__all__ = ["Context", "Json", "champion_of", "read_frame"]

Json = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What every task needs, made anew in each process. MLflow, seconds of import, is loaded when it is first asked for."""

    settings: Settings
    prompt: Prompt
    workspaces: Workspaces
    ledger: Ledger

    @classmethod
    def load(cls, prompt: Prompt) -> "Context":
        settings = Settings.load()
        workspaces = Workspaces(settings)
        return cls(settings, prompt, workspaces, Ledger(workspaces.store, prompt.name))

    @classmethod
    def of(cls, run: Json) -> "Context":
        return cls.load(Prompt.model_validate(run["prompt"]))

    @cached_property
    def tracker(self) -> "Tracker":
        from retune.tracking import Tracker

        return Tracker(self.settings.tracking_uri, self.prompt.name)

    @cached_property
    def registry(self) -> "Registry":
        from retune.registry import Registry

        return Registry(self.settings.tracking_uri, self.prompt.name)

    @contextmanager
    def failing(self, run_id: str) -> Iterator[None]:
        """Marks the MLflow run FAILED if the block raises, and RUNNING again before a later try.

        A first try that has nothing to log needs no MLflow otherwise.
        """
        if os.environ.get("AIRFLOW_CTX_TRY_NUMBER", "1") != "1":
            with self.tracker.working(run_id):
                yield
            return
        try:
            yield
        except BaseException:
            self.tracker.close(run_id, "FAILED")
            raise

    def environment(self, mlflow_run: str | None = None) -> dict[str, str]:
        """What a stage's process is told besides its files."""
        handed = {
            "RETUNE_BASE_MODELS": os.pathsep.join(map(str, self.settings.base_models)),
            "MLFLOW_TRACKING_URI": self.settings.tracking_uri,
        }
        return handed | ({"MLFLOW_RUN_ID": mlflow_run} if mlflow_run else {})

    def run_link(self, run_id: str, artifact: str = "") -> str:
        """Address of a run's page in MLflow, or of one of its artifacts."""
        page = f"{self.settings.mlflow_url}/#/experiments/{self.tracker.experiment_id()}/runs/{run_id}"
        return f"{page}/artifacts/{artifact}" if artifact else page

    def release_link(self, version: str) -> str:
        """Address of a release's page in MLflow's registry."""
        return f"{self.settings.mlflow_url}/#/models/{self.prompt.name}/versions/{version}"


def champion_of(entries: list[Entry]) -> Json:
    """The champion that a prompt's ledger names. Raises IntegrityError for a ledger without one."""
    champion = standing(entries).champion
    if champion is None:
        raise IntegrityError("the ledger names no champion, though its entry 0 should; restore it from a backup")
    return champion


def read_frame(context: Context, lineage: Lineage, path: str) -> "pd.DataFrame":
    """A tracked Parquet file, its hash verified."""
    import pandas as pd

    return pd.read_parquet(io.BytesIO(context.workspaces.read(lineage, path)))
