"""A release as the ledger recorded it, verified and on its base model; where `retune check`, `explain` and `export` start."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from retune.config import load_prompt
from retune.errors import BadInputError
from retune.inference.adapters import soft_prompt
from retune.inference.base_model import open_base_model
from retune.inference.predictor import Predictor
from retune.inference.release import Release, read_release
from retune.recorded import Recorded, named
from retune.workspace import Workspaces

__all__ = ["Tuned", "open_predictor", "open_tuned", "read_recorded"]


@dataclass(frozen=True)
class Tuned:
    recorded: Recorded
    predictor: Predictor
    soft_prompt: torch.Tensor
    """[P, H]"""


def read_recorded(workspaces: Workspaces, recorded: Recorded) -> Release:
    """Reads and verifies a recorded release. Raises IntegrityError if it is not what was recorded."""
    with tempfile.TemporaryDirectory(prefix="retune-release-") as scratch:
        folder = workspaces.fetch(recorded.lineage, f"artifacts/{recorded.prompt}/release", Path(scratch) / "release")
        return read_release(folder, recorded.release)


def open_predictor(workspaces: Workspaces, recorded: Recorded) -> Predictor:
    """A recorded release at work. Raises IntegrityError if it or its base model is not what was recorded, BadInputError without one."""
    release, settings = read_recorded(workspaces, recorded), workspaces.settings
    return Predictor.of(release, open_base_model(release.prompt.base_model, settings.project, settings.base_models))


def open_tuned(workspaces: Workspaces, prompt: str, name: str | None = None) -> Tuned:
    """The release of a prompt that is named so (see `retune.recorded.named`); None: its champion.

    Raises ConfigError for no such prompt, BadInputError for no such release, one without a soft prompt, or no base model,
    IntegrityError if the release or the base model is not the recorded one.
    """
    settings = workspaces.settings
    load_prompt(settings.prompts / f"{prompt}.yaml")  # a wrong name is told from an empty ledger
    recorded = named(workspaces.store, prompt, name)
    release = read_recorded(workspaces, recorded)
    soft = soft_prompt(release.prompt.tune, release.tensors)
    if soft is None:
        method = release.prompt.tune.method
        what = "the template alone: nothing was tuned" if method == "none" else "which tunes no soft prompt"
        raise BadInputError(
            f"release {release.id[:12]} of {prompt} has tune.method: {method}, {what}; name a release with a soft prompt with --release, "
            f"see `retune releases {prompt}`"
        )
    base = open_base_model(release.prompt.base_model, settings.project, settings.base_models)
    if base.family != "decoder":
        kind = f"{base.model.config.model_type} ({base.family})"
        raise BadInputError(
            f"release {release.id[:12]} of {prompt} is on a base model of type {kind}; only decoders are explained or exported"
        )
    return Tuned(recorded, Predictor.of(release, base), soft.to(base.device))
