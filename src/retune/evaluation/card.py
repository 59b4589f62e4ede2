"""The model card of a promoted release: README.md beside its files in MLflow, and without the header the description of its version.

Holds no time: the same decision gives the same card.
"""

import math
from collections.abc import Iterator, Mapping

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from retune.config import Prompt
from retune.evaluation import tables
from retune.evaluation.metrics import metric_named
from retune.evaluation.report import markdown_table, markdown_text, measured_on
from retune.evaluation.roles import CANDIDATE
from retune.policy import PROBES
from retune.records import Decision, Evaluation, Lineage, Trigger

__all__ = ["release_card"]

WEAKEST = 3
"""Slices that the card names."""
PIPELINES = {"classification": "text-classification", "generation": "text-generation"}
"""Task -> its name on the hub."""
HUB_METRICS: dict[str, tuple[str, dict[str, str]]] = {
    "accuracy": ("accuracy", {}),
    **{
        f"{average}_{ours}": (theirs, {"average": average})
        for average in ("macro", "weighted")
        for ours, theirs in (("f1", "f1"), ("precision", "precision"), ("recall", "recall"))
    },
    "exact_match": ("exact_match", {}),
    **{name: ("rouge", {"type": name}) for name in ("rouge1", "rouge2", "rougeL")},
    "bleu": ("sacrebleu", {}),
    "chrf": ("chrf", {}),
    "perplexity": ("perplexity", {}),
}
"""Metric -> its name on the hub and what tells it from others of that name; one that is not here has none."""


def release_card(
    decision: Decision, evaluations: Mapping[str, Evaluation], prompt: Prompt, lineage: Lineage, trigger: Trigger
) -> ModelCard:
    """What a promoted version is for, how good it is and where it is weak, what it came from, how to load and how to leave it.

    `prompt`: today's prompt file with the candidate's overrides. `evaluations`: role -> evaluation, the candidate among them.
    """
    model, candidate = prompt.base_model, evaluations[CANDIDATE]
    base = f"{model.hub} at {model.revision}" if model.hub else f"{model.path}, sha256 {model.sha256}"
    code = f"commit `{lineage.commit[:12]}`{' with uncommitted changes' if lineage.dirty else ''}"
    started = f"DAG run {markdown_text(trigger.dag_run_id)}"
    use = [("Intended use", prompt.intended_use), ("Owner", prompt.owner)]
    body = [
        f"# {prompt.name}",
        markdown_text(prompt.description) or "No description.",
        *(f"**{title}**: {markdown_text(text)}" for title, text in use if text),
        "\n".join(f"- {markdown_text(reason)}" for reason in decision.reasons),
        "## Limits",
        "\n".join(f"- {markdown_text(limit)}" for limit in _limits(candidate, prompt)),
        "## Metrics on the test split",
        markdown_table(tables.metrics(evaluations, prompt)),
        measured_on(evaluations),
        *_interval(decision),
        "## Lineage",
        "\n".join(
            [
                f"- Release `{candidate.release}`",
                f"- Dataset revision {lineage.revision}, {code}, environment `{lineage.environment[:12]}`",
                f"- Base model {markdown_text(base)}",
                f"- {f'[{started}]({trigger.url})' if trigger.url else started}, by {markdown_text(trigger.by)}",
            ]
        ),
        "## Use",
        f'`mlflow.pyfunc.load_model("models:/{prompt.name}@champion")` loads the champion; `retune rollback {prompt.name}` leaves it, '
        f"`retune reproduce {prompt.name} --release {candidate.release[:12]}` builds this release again.",
    ]
    header = _header(candidate, prompt, lineage).to_yaml()
    return ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(body) + "\n")


def _header(candidate: Evaluation, prompt: Prompt, lineage: Lineage) -> ModelCardData:
    """The card's metadata in the hub's words. What nobody has said, as the licence and the language, is left out."""
    results = [
        EvalResult(
            task_type=PIPELINES[prompt.task],
            dataset_type=prompt.name,
            dataset_name=f"{prompt.name}, test split of dataset revision {lineage.revision}",
            dataset_split="test",
            metric_type=HUB_METRICS[name][0],
            metric_name=name,
            metric_value=value,
            metric_args=HUB_METRICS[name][1] or None,
        )
        for name, value in candidate.metrics.items()
        if name in HUB_METRICS and math.isfinite(value)
    ]
    return ModelCardData(
        model_name=prompt.name,
        base_model=prompt.base_model.hub,
        pipeline_tag=PIPELINES[prompt.task],
        tags=["retune", *([] if prompt.tune.method == "none" else [prompt.tune.method.replace("_", "-")])],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        eval_results=results or None,
    )


def _limits(candidate: Evaluation, prompt: Prompt) -> Iterator[str]:
    """Where the release is weakest: slices, other labelled rows, changed rows."""
    metric, least = metric_named(prompt.promote.metric), prompt.promote.min_slice_rows
    parts = {f"{column}={value}": figures for column, values in candidate.slices.items() for value, figures in values.items()}
    known = {name: figures for name, figures in parts.items() if figures["rows"] >= least and math.isfinite(figures[metric.name])}
    weakest = sorted(known, key=lambda name: metric.sign * known[name][metric.name])[:WEAKEST]
    if weakest:
        listed = ", ".join(f"{name} ({known[name][metric.name]:.4f} on {known[name]['rows']:,.0f} rows)" for name in weakest)
        yield f"{metric.name} is {candidate.metrics[metric.name]:.4f} on all test rows; the slices with the least favourable: {listed}."
    if few := [name for name in parts if name not in known]:
        yield f"Too few test rows (fewer than {least}) to say anything of {', '.join(few)}."
    for name, figures in candidate.sets.items():
        if name not in PROBES and metric.name in figures:
            yield f"On the labelled set {name}, {metric.name} is {figures[metric.name]:.4f} ({figures['rows']:,.0f} rows)."
    if changed := {name: candidate.sets[name]["changed"] for name in PROBES if "changed" in candidate.sets.get(name, {})}:
        listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in sorted(changed.items(), key=lambda item: -item[1]))
        yield f"Share of outputs that change with a change of the row that should leave them as they are: {listed}."
    yield f"Measured on {candidate.rows:,} test rows of the data that landed, not on anything unlike them."


def _interval(decision: Decision) -> Iterator[str]:
    if found := decision.comparison:
        ends = f"from {found['low']:+.4f} to {found['high']:+.4f}, each end at {100 * found['confidence']:.4g} % confidence"
        yield f"Gain in {found['metric']} over the champion before: {found['gain']:+.4f} ({ends})."
