"""Where scenarios work: a checkout with an example prompt that is quick, and for each a store, a landing zone and an MLflow of its own."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from checkouts import ROOT, copy_project, environment_of
from fault_proxy import FaultProxy
from s3_server import S3, s3_server

from faults.scenario import Bench
from faults.workers import Worker
from retune.records import Trigger
from retune.store import Store, open_store

__all__ = ["BATCH", "NAME", "Place", "bucket_place", "checkout", "folder_place", "s3_and_proxy", "trigger"]

NAME = "ticket_priority"
BATCH = ROOT / f"examples/batches/{NAME}/1"
QUICK: dict[str, Any] = {"trials": [{}], "schedule": {"on_new_data": False}}
PROBES = {"few_shot": 0, "probes": {"rows": 5, "perturbations": ["typos"]}}


@dataclass(frozen=True)
class Place:
    """What the workers of a scenario share."""

    folder: Path
    project: Path
    store: str
    landing: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'shared/mlflow.db'}"

    @property
    def prompt_file(self) -> Path:
        return self.folder / f"prompts/{NAME}.yaml"

    def opened(self) -> Store:
        """The store, past any proxy: for counting."""
        return open_store(self.store, os.environ.get("AWS_ENDPOINT_URL_S3"))

    def worker(self, name: str, **own: str) -> Worker:
        shared = {
            "RETUNE_STORE": self.store,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            # Else a process that lives on would hold a database which a scenario lays back as it was.
            "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
            "RETUNE_PROMPTS": str(self.folder / "prompts"),
            **self.environment,
        }
        return Worker(self.folder / name, self.project, shared, own)

    def land(self, *files: Path) -> None:
        Path(self.landing).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, Path(self.landing) / file.name)


@contextmanager
def checkout(_bench: Bench, folder: Path) -> Iterator[Path]:
    """A checkout of its own, whose code is what runs; the host's settings of Retune, MLflow and AWS are away meanwhile."""
    copy_project(folder)
    with environment_of(folder):
        os.environ["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"
        yield folder
    os.environ.pop("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", None)


@contextmanager
def s3_and_proxy(_bench: Bench, folder: Path) -> Iterator[tuple[S3, FaultProxy]]:
    """A real S3 server, and the proxy through which workers see it. This process itself asks the server."""
    with s3_server(folder) as s3, FaultProxy(s3.endpoint) as proxy:
        before = dict(os.environ)
        os.environ.update(s3.env)
        try:
            yield s3, proxy
        finally:
            for name in s3.env:
                os.environ.pop(name, None)
                if name in before:
                    os.environ[name] = before[name]


def folder_place(bench: Bench, folder: Path | None = None) -> Place:
    """A folder store, and a landing folder with the first example batch, in a folder that is there; else in the scenario's."""
    project, folder = bench.shared(checkout), folder or bench.folder
    place = Place(folder, project, str(folder / "shared/store"), str(folder / "landing"))
    (folder / "shared").mkdir()
    _prompt(place)
    place.land(*BATCH.iterdir())
    return place


def bucket_place(bench: Bench, folder: Path | None = None) -> Place:
    """A bucket that is store and landing zone, seen by workers through the proxy; the rest as in `folder_place`."""
    project, folder = bench.shared(checkout), folder or bench.folder
    s3, proxy = bench.shared(s3_and_proxy)
    bucket = s3.make_bucket(folder.name.replace("_", "-"))
    environment = {**s3.env, "AWS_ENDPOINT_URL_S3": proxy.endpoint}
    place = Place(folder, project, f"s3://{bucket}/store", f"s3://{bucket}/landing", environment)
    (folder / "shared").mkdir()
    _prompt(place)
    landing = open_store(place.landing, s3.endpoint)
    for file in BATCH.iterdir():
        landing.put(file.name, file.read_bytes())
    return place


def _prompt(place: Place) -> None:
    """The prompt file, quick: one trial, few probes. What checks it has comes along."""
    (place.folder / "prompts").mkdir()
    for file in (place.project / "prompts").glob(f"{NAME}.*"):
        shutil.copyfile(file, place.folder / "prompts" / file.name)
    prompt = yaml.safe_load(place.prompt_file.read_text("utf-8"))
    prompt["source"]["path"] = place.landing
    prompt["tune"] |= {"validate_every": 10}
    prompt["evaluate"] |= PROBES
    place.prompt_file.write_text(yaml.safe_dump({**prompt, **QUICK}, sort_keys=False), "utf-8")


def trigger(run_id: str) -> dict[str, str]:
    return Trigger("test", run_id, "manual", "tester", "a fault scenario").to_json()
