from dataclasses import replace

import decisions
import pytest
import yaml
from huggingface_hub import ModelCard

from retune.evaluation.card import release_card
from retune.evaluation.page import Report


@pytest.fixture(scope="module")
def report() -> Report:
    return decisions.classification(better=0.14)


def card_of(report: Report, **fields) -> ModelCard:
    prompt = report.prompt.model_copy(update=fields)
    return release_card(report.decision, report.evaluations, prompt, decisions.LINEAGE, decisions.TRIGGER)


def test_the_header_is_what_the_hub_reads(report: Report) -> None:
    card = card_of(report)
    read = ModelCard(str(card)).data
    assert (read.pipeline_tag, read.tags, read.license, read.base_model) == ("text-classification", ["retune", "prompt-tuning"], None, None)
    assert read.metrics == ["accuracy", "f1", "precision", "recall"]
    stated = {result.metric_name: (result.metric_type, result.metric_value, result.metric_args) for result in read.eval_results}
    metrics = report.evaluations["candidate"].metrics
    assert stated == {
        "accuracy": ("accuracy", metrics["accuracy"], None),
        **{
            f"{average}_{kind}": (kind, metrics[f"{average}_{kind}"], {"average": average})
            for average in ("macro", "weighted")
            for kind in ("f1", "precision", "recall")
        },
    }


def test_a_base_model_of_the_hub_is_named_and_a_local_one_is_no_hub_id(report: Report) -> None:
    reference = report.prompt.base_model.model_copy(update={"path": None, "sha256": None, "hub": "org/small", "revision": "a" * 40})
    card = card_of(report, base_model=reference)
    assert card.data.base_model == "org/small"
    assert f"- Base model org/small at {'a' * 40}" in card.text
    assert "- Base model examples/base\\_model" not in card_of(report).text
    assert "- Base model examples/base_model, sha256 666666" in card_of(report).text


def test_the_text_says_use_limits_metrics_lineage_and_the_way_out(report: Report) -> None:
    text, candidate = card_of(report).text, report.evaluations["candidate"]
    assert text.lstrip().startswith("# ticket_priority\n")
    assert "**Intended use**: Ordering the queue only; a person answers" in text
    slices = {
        f"{column}={value}": figures["macro_f1"]
        for column, values in candidate.slices.items()
        for value, figures in values.items()
        if figures["rows"] >= 30
    }
    worst = min(slices, key=lambda name: slices[name])
    assert f"the slices with the least favourable: {worst} ({slices[worst]:.4f} on" in text
    assert "Too few test rows (fewer than 30) to say anything of channel=app." in text
    assert f"On the labelled set out_of_domain, macro_f1 is {candidate.sets['out_of_domain']['macro_f1']:.4f} (50 rows)." in text
    assert "typos 14.0 %, swaps 2.0 %." in text
    assert report.decision.comparison is not None
    assert f"Gain in macro_f1 over the champion before: {report.decision.comparison['gain']:+.4f} (from " in text
    assert f"- Release `{candidate.release}`" in text
    assert "with uncommitted changes" in text
    assert "retune rollback ticket_priority" in text


def test_text_from_data_breaks_neither_header_nor_markdown(report: Report) -> None:
    name = "web|<b>\n---\nlicense: mit"
    slices = {"channel": {name: {**report.evaluations["candidate"].slices["channel"]["email"]}}}
    evaluations = {**report.evaluations, "candidate": replace(report.evaluations["candidate"], slices=slices)}
    card = release_card(report.decision, evaluations, report.prompt, decisions.LINEAGE, decisions.TRIGGER)
    assert "channel=web\\|&lt;b> --- license: mit (" in card.text
    assert "license" not in yaml.safe_load(str(card).split("---\n")[1])


def test_the_same_release_gets_the_same_card(report: Report) -> None:
    assert str(card_of(report)) == str(card_of(decisions.classification(better=0.14)))


def test_a_release_without_what_can_be_compared_has_a_card_too() -> None:
    report = decisions.generation()
    evaluations = {"candidate": replace(report.evaluations["candidate"], slices={}, sets={}, metrics={"rougeL": 0.5})}
    decision = replace(report.decision, comparison=None)
    card = release_card(decision, evaluations, report.prompt, decisions.LINEAGE, replace(decisions.TRIGGER, url=""))
    assert card.data.pipeline_tag == "text-generation"
    assert [(result.metric_type, result.metric_args) for result in card.data.eval_results] == [("rouge", {"type": "rougeL"})]
    assert "- DAG run manual__2026-05-04, by anna" in card.text
    assert "Gain in" not in card.text
