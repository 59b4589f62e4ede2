"""A release as the tasks hand it on: its id, where DVC keeps it, and its registration in MLflow."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from retune.config import Prompt
from retune.records import Lineage
from retune.registry import Registry
from retune.tasks.context import Json
from retune.workspace import Workspaces

__all__ = ["ReleaseRecord", "read_release_record", "register"]


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
    own = Prompt.model_validate(yaml.safe_load(workspaces.read(lineage, f"{place}/prompt.yaml")))
    outs = [out for out in workspaces.section(lineage, "tune", prompt.name)["outs"] if out["path"] == place]
    return ReleaseRecord(
        hashlib.sha256(manifest).hexdigest(),
        outs,
        None if own.tune.method == "none" else own.preprocess.splits.model_dump(mode="json"),
        str(own.base_model.sha256 or own.base_model.revision),
    )


def register(registry: Registry, workspaces: Workspaces, prompt: Prompt, lineage: Lineage, run_id: str, tags: Json) -> str:
    """Version number of the lineage's release in MLflow's registry; the same one however often it is called.

    Raises IntegrityError if the release, or what MLflow made of it, is not whole.
    """
    from retune.inference.release import read_release  # brings torch, which the other tasks' processes can do without

    with tempfile.TemporaryDirectory(prefix="retune-release-") as scratch:
        folder = workspaces.fetch(lineage, f"artifacts/{prompt.name}/release", Path(scratch) / "release")
        release = read_release(folder)
        return registry.register(prompt, release.id, folder, run_id, {k: str(v) for k, v in tags.items()})
