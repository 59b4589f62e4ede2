"""What stands in store, ledgers and MLflow, as a multiset of things by name, so that two states can be subtracted from one another."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from retune.audit import audit
from retune.config import load_prompt
from retune.dvc_files import REMOTE
from retune.ledger import Ledger
from retune.objects import Objects
from retune.records import Lineage
from retune.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["audited", "compared", "in_mlflow", "in_store", "rows"]


def in_store(store: Store, prompt: str) -> "Counter[str]":
    """All objects under their hash (a damaged one under another name), and a prompt's sections, entries and rows of the live revision."""
    found: Counter[str] = Counter()
    for key in store.list(f"{REMOTE}/"):
        name = "".join(key.split("/")[-2:]).removesuffix(".dir")
        found[f"object {key}" if store.md5(key) == name else f"damaged object {key}"] += 1
    found.update(f"section {key}" for key in store.list(f"sections/{prompt}/"))
    found.update(f"unused checkpoint {key}" for key in store.list(f"checkpoints/{prompt}/") if store.get(key))
    for ledger in ("dataset", prompt):
        for entry in Ledger(store, ledger).entries():
            champion = (entry.body.get("champion") or {}).get("release", "")
            found[f"entry {ledger} {entry.kind} {entry.body.get('dag_run_id')} {champion}"] += 1
    found.update(rows(store, prompt))
    return found


def rows(store: Store, prompt: str) -> "Counter[str]":
    """The rows of a prompt in the live dataset revision, by content: a row that a replaced object still has keeps its old number."""
    head = Ledger(store, "dataset").head()
    if head is None:
        return Counter()
    objects = Objects(store, Path("/nonexistent"))
    found: Counter[str] = Counter()
    for md5 in objects.files(Lineage(head.body["data"], "", {}, "", False, ""), f"data/{prompt}").values():
        frame = pd.read_parquet(io.BytesIO(objects.get(md5))).drop(columns=["object", "row", "bucket"])
        found.update(f"row {json.dumps(record, sort_keys=True, ensure_ascii=False)}" for record in frame.to_dict("records"))
    return found


def in_mlflow(uri: str, prompt: str) -> "Counter[str]":
    """Runs with their state, parameters, points of metrics (but the machine's), tags, inputs and artifacts; logged models; versions by
    release; and where the aliases point."""
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModelStatus

    client = MlflowClient(tracking_uri=uri)
    found: Counter[str] = Counter()
    experiment = client.get_experiment_by_name(prompt)
    if experiment is None:
        return found
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        name = run.info.run_name
        found[f"run {name} {run.info.status}"] += 1
        found.update(f"parameter {name} {key}={value}" for key, value in run.data.params.items())
        found.update(f"tag {name} {key}" for key in run.data.tags if key.startswith("retune."))
        found.update(f"input {name} {given.dataset.name} {given.dataset.digest}" for given in run.inputs.dataset_inputs)
        found.update(f"artifact {name} {path}" for path in _artifacts(client, run.info.run_id))
        for metric in run.data.metrics:
            if not metric.startswith("system/"):
                points = client.get_metric_history(run.info.run_id, metric)
                found.update(f"point {name} {metric} {point.step}" for point in points)
    logged = client.search_logged_models([experiment.experiment_id], max_results=100)
    # One that a kill left half logged stays PENDING, and nothing is made of it.
    found["model"] += sum(model.status == LoggedModelStatus.READY for model in logged)
    for version in client.search_model_versions(f"name = '{prompt}'"):
        found[f"version {version.tags.get('retune.release')}"] += 1
    for model in client.search_registered_models(f"name = '{prompt}'"):
        for alias, number in model.aliases.items():
            version = client.get_model_version(prompt, number)
            found[f"alias {alias} {version.tags.get('retune.release')}"] += 1
    return found


def _artifacts(client: "MlflowClient", run_id: str, folder: str | None = None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _artifacts(client, run_id, item.path)
        else:
            yield item.path


def compared(expected: "Counter[str]", found: "Counter[str]") -> tuple[int, int, str]:
    """What of `expected` is missing, what is there beyond it, and the first few of both in words."""
    lost, doubled = expected - found, found - expected
    words = [*(f"missing: {name}" for name in list(lost)[:5]), *(f"too much: {name}" for name in list(doubled)[:5])]
    return lost.total(), doubled.total(), "; ".join(words)


def audited(store: Store, prompt_file: Path) -> list[str]:
    """What `retune audit` finds wrong with a prompt's ledger and that of the data; nothing where both hold."""
    return audit(store, load_prompt(prompt_file)).problems
