"""A release as the tasks hand it on: its id, where DVC keeps it, and its registration in MLflow."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retune.config import Prompt, parse_yaml
from retune.errors import IntegrityError
from retune.ledger import Entry
from retune.recorded import as_it_reads_now, by_release
from retune.records import Lineage
from retune.tasks.context import Context, Json, read_frame
from retune.workspace import Workspaces

if TYPE_CHECKING:
    from retune.registry import Registry

__all__ = ["SMOKE_ROWS", "ReleaseRecord", "read_release_record", "record_of", "register", "smoke_test"]

SMOKE_ROWS = 8
"""Test rows that a release must answer before, or right after, it becomes the champion."""


@dataclass(frozen=True)
class ReleaseRecord:
    """What the ledger keeps of a release, beside its lineage."""

    release: str
    """Release id: sha256 of its manifest."""
    outs: list[Json]
    """The release folder as dvc.lock names it, so that it can be laid beside later data and code."""
    splits: Json | None
    """Split shares it was tuned under; None for the template alone, which has seen no rows."""
    base_model: str
    """sha256 or revision of its base model."""

    def champion(self, version: str, metrics: Json) -> Json:
        """The ledger's `champion`."""
        return {
            "release": self.release,
            "version": version,
            "metrics": metrics,
            "outs": self.outs,
            "splits": self.splits,
            "base_model": self.base_model,
        }


def read_release_record(workspaces: Workspaces, prompt: Prompt, lineage: Lineage) -> ReleaseRecord:
    """The release that a lineage's tune section holds. Raises IntegrityError if its bytes are not the recorded ones."""
    place = f"artifacts/{prompt.name}/release"
    manifest = workspaces.read(lineage, f"{place}/manifest.json")
    own = Prompt.model_validate(parse_yaml(workspaces.read(lineage, f"{place}/prompt.yaml"), f"{place}/prompt.yaml"))
    outs = [out for out in workspaces.section(lineage, "tune", prompt.name)["outs"] if out["path"] == place]
    return ReleaseRecord(
        hashlib.sha256(manifest).hexdigest(),
        outs,
        None if own.tune.method == "none" else own.preprocess.splits.model_dump(mode="json"),
        str(own.base_model.sha256 or own.base_model.revision),
    )


def register(registry: "Registry", workspaces: Workspaces, prompt: Prompt, lineage: Lineage, run_id: str, tags: Json) -> str:
    """Version number of the lineage's release in MLflow's registry; the same one however often it is called.

    Raises IntegrityError if the release, or what MLflow made of it, is not whole.
    """
    from retune.inference.release import read_release  # brings torch, which the other tasks' processes can do without

    with tempfile.TemporaryDirectory(prefix="retune-release-") as scratch:
        folder = workspaces.fetch(lineage, f"artifacts/{prompt.name}/release", Path(scratch) / "release")
        release = read_release(folder)
        return registry.register(prompt, release.id, folder, run_id, {k: str(v) for k, v in tags.items()})


def record_of(context: Context, entries: list[Entry], release: str, version: str) -> Json:
    """The ledger's `champion` for a release that it knows, champion once or not.

    Raises IntegrityError for one that it does not know.
    """
    for entry in reversed(entries):
        champion = entry.body.get("champion")
        if champion and champion["release"] == release:
            return dict(champion)
    lineage = _lineage(context, entries, release)
    metrics = next(e.body["candidate"]["metrics"] for e in reversed(entries) if (e.body.get("candidate") or {}).get("release") == release)
    return read_release_record(context.workspaces, context.prompt, lineage).champion(version, metrics)


def smoke_test(context: Context, entries: list[Entry], release: str, reference: str) -> None:
    """Loads a registered release as any MLflow user would and has it answer some of the test rows that it was judged on.

    `reference`: `@ALIAS` or `/VERSION`. The answers must be those that the pipeline recorded; the template alone, which was never
    judged, must only give valid ones. Raises IntegrityError if it does not load or answers otherwise.
    """
    import numpy as np
    import pandas as pd
    from mlflow.exceptions import MlflowException

    lineage = _lineage(context, entries, release)
    model, place = f"models:/{context.prompt.name}{reference}", f"artifacts/{context.prompt.name}"
    test = read_frame(context, lineage, f"{place}/dataset/test.parquet").head(SMOKE_ROWS)
    try:
        got = context.registry.predict(reference, test.reset_index(drop=True), context.settings.base_models)
    except (MlflowException, OSError) as error:
        raise IntegrityError(f"{model} (release {release[:12]}) does not load: {error}") from error
    scores = [column for column in got.columns if column.startswith("p_")]
    if not np.isfinite(got[scores].to_numpy(dtype=float)).all() or got["prediction"].isna().any():
        raise IntegrityError(f"{model} (release {release[:12]}) answers with missing values or probabilities that are no numbers")
    if f"evaluate@{context.prompt.name}" not in lineage.lock:
        return
    expected = read_frame(context, lineage, f"{place}/predictions.parquet").head(SMOKE_ROWS)
    if list(got["prediction"]) != list(expected["prediction"]):
        raise IntegrityError(
            f"{model} answers {list(got['prediction'])} where the pipeline answered {list(expected['prediction'])}; "
            "look at the version's requirements, then `retune rollback` if it serves"
        )
    try:
        pd.testing.assert_frame_equal(got[scores], expected[scores].reset_index(drop=True), check_exact=False, atol=1e-4)
    except AssertionError as error:
        raise IntegrityError(f"{model} gives other probabilities than the pipeline recorded: {error}") from None


def _lineage(context: Context, entries: list[Entry], release: str) -> Lineage:
    known = by_release(context.prompt.name, entries)
    if release not in known:
        raise IntegrityError(f"the ledger of {context.prompt.name} does not know release {release[:12]}")
    return as_it_reads_now(context.workspaces.store, known[release]).lineage
