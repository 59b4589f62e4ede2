"""The patch of a run: what `git apply` and `dvc pull` make of a checkout, as an artifact. Nothing is committed, nothing is opened."""

from retune.checkout import lineage_patch
from retune.records import Lineage
from retune.tasks.context import Context

__all__ = ["PATCH", "log_patch"]

PATCH = "patch/retune.patch"


def log_patch(context: Context, run_id: str, lineage: Lineage) -> None:
    """Logs the patch of a lineage, such as the candidate's, to a run in MLflow. Retry: written again, the same."""
    context.tracker.text(run_id, lineage_patch(context.workspaces, lineage, context.prompt.name), PATCH)
