"""What the tasks of a retrain run share."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from retune.config import Prompt
from retune.errors import IntegrityError
from retune.ledger import Entry, Ledger, standing
from retune.records import Lineage
from retune.registry import Registry
from retune.settings import Settings
from retune.tracking import Tracker
from retune.workspace import Workspaces

__all__ = ["Context", "Json", "Trigger", "champion_of", "read_frame"]

Json = dict[str, Any]


@dataclass(frozen=True)
class Trigger:
    """Why and by whom a DAG run was started."""

    dag_run_id: str
    run_type: str
    """manual, scheduled or asset_triggered."""
    by: str
    overrides: Mapping[str, Any]
    force: bool
    """Go through even if the ledger has decided on the same inputs."""
    reason: str


@dataclass(frozen=True)
class Context:
    """What every task needs, made anew in each process."""

    settings: Settings
    prompt: Prompt
    workspaces: Workspaces
    ledger: Ledger
    tracker: Tracker
    registry: Registry

    @classmethod
    def load(cls, prompt: Prompt) -> "Context":
        settings = Settings.load()
        workspaces = Workspaces(settings)
        return cls(
            settings,
            prompt,
            workspaces,
            Ledger(workspaces.store, prompt.name),
            Tracker(settings.tracking_uri, prompt.name),
            Registry(settings.tracking_uri, prompt.name),
        )

    @classmethod
    def of(cls, run: Json) -> "Context":
        return cls.load(Prompt.model_validate(run["prompt"]))

    def environment(self, mlflow_run: str | None = None) -> dict[str, str]:
        """What a stage's process is told besides its files."""
        handed = {
            "RETUNE_BASE_MODELS": os.pathsep.join(map(str, self.settings.base_models)),
            "MLFLOW_TRACKING_URI": self.settings.tracking_uri,
        }
        return handed | ({"MLFLOW_RUN_ID": mlflow_run} if mlflow_run else {})


def champion_of(entries: list[Entry]) -> Json:
    """The champion that a prompt's ledger names. Raises IntegrityError for a ledger without one."""
    champion = standing(entries).champion
    if champion is None:
        raise IntegrityError("the ledger names no champion, though its entry 0 should; restore it from a backup")
    return champion


def read_frame(context: Context, lineage: Lineage, path: str) -> pd.DataFrame:
    """A tracked Parquet file, its hash verified."""
    return pd.read_parquet(io.BytesIO(context.workspaces.read(lineage, path)))
