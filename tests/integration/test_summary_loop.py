"""Text to text from landing to verdict, through the tasks of the DAGs: several references, sacreBLEU's figures, a registered version."""

import json
import os
import re
import shutil
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from checkouts import run as run_module
from huggingface_hub import ModelCard
from loops import trigger

from retune.evaluation.metrics import aggregate_metrics, task_metrics
from retune.inference.release import read_release
from retune.ledger import Ledger
from retune.records import Lineage
from retune.store import open_store

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]
NAME = "ticket_summary"


def test_a_summary_is_tuned_judged_and_served(project: Path) -> None:
    from retune.tasks import retrain, verdict
    from retune.tasks.context import Context, read_frame
    from retune.tasks.ingest import ingest
    from retune.tasks.measure import measure
    from retune.tasks.resolve import resolve

    landing = project / ".retune/landing" / NAME
    landing.mkdir(parents=True)
    shutil.copy(project / "examples/batches" / NAME / "1/2026-01-summaries.csv", landing)
    assert ingest(NAME, "ingest", "test") is not None
    run = resolve(NAME, trigger("run", "text to text"), {"tune.epochs": 4})
    assert run is not None
    run = retrain.preprocess(run)
    tuned = [retrain.tune(run, trial) for trial in retrain.plan(run, [{}])]
    evaluated = [retrain.evaluate(run, contender) for contender in retrain.select(run, tuned)]
    assert [(item["role"], item["trial"]["name"]) for item in evaluated if "trial" in item] == [
        ("candidate", "1: as in the prompt file"),
        ("few_shot", "few-shot baseline"),
    ]
    measured = measure(run, evaluated)
    decided = verdict.decide(run, evaluated, measured)
    assert decided["verdict"] == "PROMOTE"
    assert verdict.promote(run, evaluated, measured, decided)["version"] == "2"  # which loads it from MLflow and compares its answers

    context = Context.of(run)
    candidate = next(item for item in evaluated if item["role"] == "candidate")
    predictions = read_frame(context, Lineage.from_json(candidate["lineage"]), f"artifacts/{NAME}/predictions.parquet")
    stated = candidate["evaluation"]["metrics"]
    assert {"reference_nats", "reference_tokens", "prediction", "target"} <= set(predictions.columns)
    assert predictions["target"].str.contains("\n").any()
    assert aggregate_metrics(predictions, []) == pytest.approx(stated)
    assert set(candidate["evaluation"]["signatures"]) == {"bleu", "chrf"}

    client = mlflow.MlflowClient(context.settings.tracking_uri)
    logged = client.get_run(run["mlflow_run_id"]).data.metrics
    assert {metric.name for metric in task_metrics("generation")} - set(stated) == {"relevance"}, "there is no encoder"
    for name, value in stated.items():
        assert logged[name] == pytest.approx(value)
        assert f"baseline_{name}" in logged
        assert f"few_shot_{name}" in logged
    report = Path(client.download_artifacts(run["mlflow_run_id"], "decision/decision.md")).read_text("utf-8")
    assert "sacreBLEU: bleu `nrefs:var|case:mixed" in report
    assert "## rougeL by slice" in report
    page = Path(client.download_artifacts(run["mlflow_run_id"], "decision/report.html")).read_text("utf-8")
    assert decided["links"]["Report"].endswith(f"{run['mlflow_run_id']}/artifacts/decision/report.html")
    assert all(reason.split(":")[0] in page for reason in decided["judged"]["decision"]["reasons"])
    assert "1: as in the prompt file (candidate)" in page, "its learning curve"
    sample = json.loads(Path(client.download_artifacts(run["mlflow_run_id"], "decision/sample.json")).read_text("utf-8"))
    assert {row["id"] for row in sample["rows"]} <= set(predictions["id"])

    version = client.get_model_version(NAME, "2")
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/2"))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.pipeline_tag, card.data.tags) == ("text-generation", ["retune", "prompt-tuning"])
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}["rougeL"] == pytest.approx(stated["rougeL"])
    assert version.description == card.text.strip()
    assert read_release(folder / "artifacts/release").id == candidate["release"], "the card is no part of the release"
    assert [file.path for file in client.list_artifacts(run["mlflow_run_id"], "decision") if file.path.endswith(".png")] == [
        "decision/slices.png"
    ]
    store = open_store(str(Path(os.environ["RETUNE_PROJECT"]) / ".retune/store"))
    promoted = Ledger(store, NAME).entries()[-1]
    assert (promoted.kind, promoted.body["few_shot"]["release"]) == ("promote", evaluated[1]["release"])
    assert promoted.body["few_shot"]["metrics"] == evaluated[1]["evaluation"]["metrics"]
    print("few-shot", evaluated[1]["evaluation"]["metrics"], evaluated[1]["seconds"], [t["seconds"] for t in tuned])
    answer = context.registry.predict(
        "@champion", pd.DataFrame({"text": ["My printer is dead. I want a refund."]}), context.settings.base_models
    )
    assert list(answer.columns) == ["prediction"]
    print(stated, answer["prediction"].tolist())

    told = run_module(project, "retune.cli", "reproduce", NAME).stdout
    assert re.findall(r"Running stage '(\w+)@", told) == ["preprocess", "tune"]
    assert f"release {candidate['release'][:12]}, byte for byte" in told
