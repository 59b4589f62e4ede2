"""A tuned release as the ledger recorded it, verified and on its base model; what `retune explain` and `retune export` start from."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from retune.config import load_prompt
from retune.errors import BadInputError
from retune.inference.base_model import open_base_model
from retune.inference.predictor import Predictor
from retune.inference.release import read_release
from retune.recorded import Recorded, named
from retune.workspace import Workspaces

__all__ = ["Tuned", "open_tuned"]


@dataclass(frozen=True)
class Tuned:
    recorded: Recorded
    predictor: Predictor
    soft_prompt: torch.Tensor
    """[P, H]"""


def open_tuned(workspaces: Workspaces, prompt: str, beginning: str | None = None) -> Tuned:
    """The release of a prompt whose id begins so; None: its champion.

    Raises ConfigError for no such prompt, BadInputError for no such release, one that nothing was tuned for, or no base model,
    IntegrityError if the release or the base model is not the recorded one.
    """
    settings = workspaces.settings
    load_prompt(settings.prompts / f"{prompt}.yaml")  # a wrong name is told from an empty ledger
    recorded = named(workspaces.store, prompt, beginning)
    with tempfile.TemporaryDirectory(prefix="retune-release-") as scratch:
        folder = workspaces.fetch(recorded.lineage, f"artifacts/{prompt}/release", Path(scratch) / "release")
        release = read_release(folder, recorded.release)
    if release.soft_prompt is None:
        raise BadInputError(
            f"release {release.id[:12]} of {prompt} has tune.method: none, the template alone: nothing was tuned; name a tuned release "
            f"with --release, see `retune releases {prompt}`"
        )
    base = open_base_model(release.prompt.base_model, settings.project, settings.base_models)
    predictor = Predictor.of(release, base)
    return Tuned(recorded, predictor, release.soft_prompt.to(base.device))
