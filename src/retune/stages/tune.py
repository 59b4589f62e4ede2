"""Stage tune: train and validation splits in, a release and its curve out.

Reads::

    artifacts/<prompt>/dataset/train.parquet  validation.parquet  inputs.json
    artifacts/<prompt>/prompt.yaml resolved: the trial's overrides stand in it
    the base model                 verified by hash

Writes::

    artifacts/<prompt>/release/    manifest.json, prompt.yaml, adapter/ (method full: model/; few_shot: examples/; none: nothing more;
                                   encoders: classifier/)
    artifacts/<prompt>/curve.csv   step, epoch, train_loss, validation_loss, learning_rate

Streams the curve and system metrics to the MLflow run in MLFLOW_RUN_ID, where there is one. A server that is away does not stop the tuning:
the parent task compares and logs the curve from the file. Raises: IntegrityError on a wrong base model; BadInputError when a loss is not
finite, with the best prompt until then kept as a release in the folder `last_good` and in the run's artifacts.

Retry: safe. Goes on from the file that RETUNE_CHECKPOINT names, where it holds a state, and writes it every RETUNE_CHECKPOINT_SECONDS;
whoever hands the file down answers for its belonging to the same inputs. SIGTERM saves it and ends the stage with 143.
RETUNE_PROCESSES: processes (one per GPU) that share each batch; the stage starts them.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from retune.config import Prompt, sha256_json
from retune.errors import BadInputError, ConfigError
from retune.inference.base_model import open_base_model
from retune.inference.release import write_release
from retune.prompt_tuning import DivergedError, TuneResult, tune
from retune.prompt_tuning.allocator import keep_freed_memory
from retune.prompt_tuning.checkpoints import Checkpoint, Stop, StoppedError
from retune.prompt_tuning.processes import is_first, process_group
from retune.stages import CHECKPOINT, code_sha256, run_stage

LAST_GOOD = "last_good"
"""Folder of a release, beside where it would have been written, of the best prompt of a run that diverged."""
COLUMNS = ("step", "epoch", "train_loss", "validation_loss", "learning_rate")


@contextmanager
def _stream() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that prints a curve row and sends it to the MLflow run handed down."""
    run_id = os.environ.get("MLFLOW_RUN_ID") if is_first() else None

    def show(row: dict[str, Any]) -> None:
        if row.get("validation_loss") is not None:
            print("  ".join(f"{k} {row[k]:.4g}" for k in COLUMNS if row.get(k) is not None), flush=True)

    if not run_id:
        yield show
        return
    import mlflow  # a second of start-up that a run by hand does not need

    broken = False
    known: set[tuple[str, int]] = set()
    pending: list[dict[str, Any]] = []
    sent = time.monotonic()

    def flush() -> None:
        nonlocal broken, sent
        metrics = [
            mlflow.entities.Metric(k, float(row[k]), int(row["time"] * 1000), int(row["step"]))
            for row in pending
            for k in COLUMNS[1:]
            if row.get(k) is not None and (k, int(row["step"])) not in known
        ]
        pending.clear()
        sent = time.monotonic()
        try:
            for start in range(0, len(metrics), 500):
                mlflow.MlflowClient().log_batch(run_id, metrics=metrics[start : start + 500])
        except mlflow.exceptions.MlflowException as error:
            broken = True
            _away(error)

    def send(row: dict[str, Any]) -> None:
        show(row)
        if broken:
            return
        pending.append({**row, "time": time.time()})
        if row.get("validation_loss") is not None or time.monotonic() - sent > 2:
            flush()

    os.environ.setdefault("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")  # s; at MLflow's 10, a short trial ends without one
    try:
        known = _streamed(run_id)
        mlflow.start_run(run_id=run_id, log_system_metrics=True)
    except mlflow.exceptions.MlflowException as error:
        _away(error)
        yield show
        return
    status = "FAILED"
    try:
        yield send
        if pending and not broken:
            flush()
        status = "FINISHED"
    finally:
        try:
            mlflow.end_run(status)
        except mlflow.exceptions.MlflowException as error:
            _away(error)


def _streamed(run_id: str) -> set[tuple[str, int]]:
    """Metric and step of the points that a try before this one has sent; a point that is sent again stands in the curve twice."""
    import mlflow

    client = mlflow.MlflowClient()
    there = client.get_run(run_id).data.metrics.keys() & set(COLUMNS)
    return {(name, int(point.step)) for name in there for point in client.get_metric_history(run_id, name)}


def _away(error: Exception) -> None:
    print(f"MLflow is away ({error}); tuning goes on, the curve follows from its file", file=sys.stderr, flush=True)


def main(prompt: Prompt) -> None:
    if (count := os.environ.get("RETUNE_PROCESSES", "1")) != "1" and "WORLD_SIZE" not in os.environ:
        sys.exit(_on_processes(count, prompt.name))
    keep_freed_memory()
    stop = Stop()
    try:
        with stop.listening(), process_group():
            _tune(prompt, stop)
    except StoppedError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)


def _on_processes(count: str, prompt: str) -> int:
    """Exit code of this very stage on several processes."""
    if not count.isdigit() or count == "0":
        raise ConfigError(f"RETUNE_PROCESSES must be a whole number >= 1, got {count!r}")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", count]
    return subprocess.run([sys.executable, "-m", *launcher, "-m", "retune.stages.tune", prompt], check=False).returncode


def _checkpoint() -> Checkpoint | None:
    place = os.environ.get("RETUNE_CHECKPOINT")
    seconds = float(os.environ.get("RETUNE_CHECKPOINT_SECONDS", "60"))
    return Checkpoint(Path(place), seconds, lambda _, step: print(f"{CHECKPOINT}{step}", flush=True)) if place else None


def _tune(prompt: Prompt, stop: Stop) -> None:
    artifacts = Path(f"artifacts/{prompt.name}")
    splits = {name: pd.read_parquet(artifacts / f"dataset/{name}.parquet") for name in ("train", "validation")}
    folders = [Path(p) for p in os.environ.get("RETUNE_BASE_MODELS", "").split(os.pathsep) if p]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[prompt.tune.precision]
    base = open_base_model(prompt.base_model, Path.cwd(), folders, dtype)
    released = prompt.released()
    inputs = json.loads((artifacts / "dataset/inputs.json").read_text("utf-8")) | {
        "code": code_sha256("tune", prompt.name),
        "environment": hashlib.sha256(Path("requirements.lock").read_bytes()).hexdigest(),
        "parameters": sha256_json(prompt.tune.model_dump(mode="json")),
    }

    def release(folder: str, found: TuneResult) -> str:
        return write_release(artifacts / folder, released, found.best, base, inputs, found.examples)

    with _stream() as send:
        try:
            result = tune(base, released, splits["train"], splits["validation"], lambda row: send(dict(row)), _checkpoint(), stop)
        except DivergedError as error:
            if is_first():
                shutil.rmtree(artifacts / LAST_GOOD, ignore_errors=True)
                release(LAST_GOOD, error.best)
                raise BadInputError(f"{error}; it is kept as a release: {_shown(artifacts / LAST_GOOD)}") from error
            raise BadInputError(str(error)) from error
        start = {"step": 0, "epoch": 0, "validation_loss": result.initial_validation_loss}
        send(start)
    if not is_first():
        return
    identity = release("release", result)
    pd.DataFrame([start, *result.curve], columns=list(COLUMNS)).to_csv(artifacts / "curve.csv", index=False)
    print(f"release {identity}: best step {result.best_step} of {result.steps}", flush=True)


def _shown(folder: Path) -> str:
    """Where the folder is found once the stage has failed: a task's workspace goes with it, the MLflow run stays."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        import mlflow

        try:
            mlflow.MlflowClient().log_artifacts(run_id, str(folder), LAST_GOOD)
        except (mlflow.exceptions.MlflowException, OSError) as error:
            print(f"MLflow is away ({error}); what was best is not in its run", file=sys.stderr, flush=True)
        else:
            return f"artifacts {LAST_GOOD}/ of MLflow run {run_id}"
    return str(folder)


if __name__ == "__main__":
    run_stage(main)
