"""The patch of a run: what `git apply` and `dvc pull` make of a checkout, as an artifact. Nothing is committed, nothing is opened."""

from retune.checkout import lineage_patch
from retune.records import Lineage
from retune.tasks.context import Context, Json

__all__ = ["PATCH", "log_patch"]

PATCH = "patch/retune.patch"


def log_patch(run: Json, lineage: Json) -> None:
    """Logs the patch of a lineage, such as the candidate's, to the run in MLflow. Retry: written again, the same."""
    context = Context.of(run)
    text = lineage_patch(context.workspaces, Lineage.from_json(lineage), context.prompt.name)
    context.tracker.text(run["mlflow_run_id"], text, PATCH)
