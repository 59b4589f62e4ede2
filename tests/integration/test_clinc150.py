"""Real text: the loop from ingest to decision on CLINC150's ten domains, as JSONL and as the kind of TSV that users bring."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import yaml
from loops import loop

from retune.ledger import Ledger
from retune.store import open_store

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]
SHARED = Path(os.environ.get("RETUNE_SHARED_DATA", Path(__file__).parents[3] / "shared/data")) / "clinc150"
ROWS_A_DOMAIN = 50
"""Of each domain's rows, in the file's order: enough to run the loop, few enough for a test."""


def rows() -> list[tuple[str, str]]:
    if not (SHARED / "data_full.json").is_file():
        pytest.skip(f"real text is absent: CLINC150 is not at {SHARED} (RETUNE_SHARED_DATA names another place)")
    domains = {i: d for d, intents in json.loads((SHARED / "domains.json").read_text("utf-8")).items() for i in intents}
    taken: dict[str, int] = {}
    out = []
    for text, intent in json.loads((SHARED / "data_full.json").read_text("utf-8"))["train"][::7]:
        domain = domains[intent]
        if taken.setdefault(domain, 0) < ROWS_A_DOMAIN:
            taken[domain] += 1
            out.append((text, domain))
    return out


def prompt_file(project: Path, name: str, labels: list[str], source: dict[str, object]) -> None:
    """A prompt file as a user would write it, on the example's base model."""
    example = yaml.safe_load((project / "prompts/ticket_priority.yaml").read_text("utf-8"))
    prompt = {
        "name": name,
        "description": "Which domain a request belongs to",
        "task": "classification",
        "base_model": example["base_model"],
        "source": {"path": f"landing/{name}", **source},
        "template": "Request: {text}\nDomain:",
        "target": "domain",
        "labels": {label: f" {label.replace('_', ' ')}" for label in labels},
        "preprocess": {"max_tokens": 64, "splits": {"train": 0.4, "validation": 0.2, "test": 0.4}},
        "tune": {"epochs": 1, "learning_rate": 0.03, "validate_every": 50},
        "promote": {"metric": "accuracy"},
    }
    (project / f"prompts/{name}.yaml").write_text(yaml.safe_dump(prompt), "utf-8")


def whole_loop(name: str) -> dict[str, object]:
    """Ingest to decision, and promotion if the gate says so; returns the ledger's last entry."""
    from retune.tasks.ingest import ingest

    assert ingest(name, f"ingest {name}", "test") is not None
    assert ingest(name, f"ingest {name} again", "test") is None
    assert loop(name, f"run {name}") is not None
    assert loop(name, f"again {name}", run_type="scheduled") is None, "decided before"
    store = open_store(str(Path(os.environ["RETUNE_PROJECT"]) / ".retune/store"))
    dataset = Ledger(store, "dataset").head()
    assert dataset is not None
    (record,) = dataset.body["objects"][name].values()
    return {"record": record, "entry": Ledger(store, name).entries()[-1]}


def report(name: str, outcome: dict[str, object]) -> None:
    entry = outcome["entry"]
    body = entry.body  # type: ignore[attr-defined]
    figures = {role: body[role]["metrics"]["accuracy"] for role in ("baseline", "champion_before", "candidate")}
    print(f"{name}: {body['decision']['verdict']}, accuracy {figures}")


def test_jsonl(project: Path) -> None:
    landed = rows()
    folder = project / "landing/clinc_jsonl"
    folder.mkdir(parents=True)
    pd.DataFrame(landed, columns=["text", "domain"]).to_json(folder / "requests.jsonl", orient="records", lines=True, force_ascii=False)
    prompt_file(project, "clinc_jsonl", sorted({domain for _, domain in landed}), {})
    outcome = whole_loop("clinc_jsonl")
    record = outcome["record"]
    distinct = len({(" ".join(text.split()), domain) for text, domain in landed})
    assert (record["rows"], record["kept"], record["quarantined"]) == (len(landed), distinct, {})  # type: ignore[index]
    assert record["duplicates"] == len(landed) - distinct  # type: ignore[index]
    report("JSONL", outcome)


def test_headerless_oddly_quoted_tsv(project: Path) -> None:
    """No header, label first, some fields in quotes with doubled quotes and a tab inside, stray quotes in others, an unusable row."""
    landed = rows()
    lines = []
    for number, (text, domain) in enumerate(landed):
        if number % 5 == 0:
            lines.append(f'{domain}\t"{text} ""now""\tplease"')
        elif number % 5 == 1:
            lines.append(f'{domain}\tit is 5" wide: {text}')
        else:
            lines.append(f"{domain}\t{text}")
    lines.insert(7, "banking")
    lines.insert(9, "no_such_domain\twhat is this")
    folder = project / "landing/clinc_tsv"
    folder.mkdir(parents=True)
    (folder / "export.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    prompt_file(project, "clinc_tsv", sorted({d for _, d in landed}), {"columns": {"domain": 0, "text": 1}, "header": False})
    outcome = whole_loop("clinc_tsv")
    record = outcome["record"]
    assert record["rows"] == len(landed) + 2  # type: ignore[index]
    assert record["quarantined"] == {"malformed": 1, "unknown_label": 1}  # type: ignore[index]
    assert record["kept"] + record["duplicates"] == len(landed)  # type: ignore[index]
    report("TSV", outcome)
