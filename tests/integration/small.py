"""A checkout with little data, one revision of them and one decision, for tests of what is kept: real stages, as short as they can be."""

import csv
import io
from pathlib import Path

import yaml
from checkouts import ROOT, copy_project, environment_of

NAME = "ticket_priority"
HERS = "The lift at Rose Lane is stuck between two floors again and my mother is in it."
"""A person's row, landed with the first file; its bucket puts it into the training split."""
TESTED = "I have written from Rose Lane three times about the door and heard nothing."
"""Another one, in the test split, which is so small that the report shows all of it."""
QUARANTINED = "A ticket from Rose Lane with a label that is none."
ROWS = 100


def landed(rows: int, *more: tuple[str, str]) -> str:
    """A file to land: that many example rows, then these (text and label)."""
    with (ROOT / "examples/batches" / NAME / "1/2026-02-helpdesk.csv").open(encoding="utf-8-sig", newline="") as file:
        read = csv.DictReader(file)
        listed = [row for row, _ in zip(read, range(rows), strict=False)]
    names = list(listed[0])
    target = io.StringIO()
    writer = csv.DictWriter(target, names)
    writer.writeheader()
    writer.writerows([*listed, *({**listed[0], "ticket_id": f"X{n}", "text": t, "label": label} for n, (t, label) in enumerate(more))])
    return target.getvalue()


def small_project(target: Path) -> Path:
    """Ingests and retrains once: a candidate tuned for an epoch, and the few-shot baseline, whose release holds training rows."""
    project = copy_project(target)
    path = project / f"prompts/{NAME}.yaml"
    prompt = yaml.safe_load(path.read_text("utf-8"))
    prompt["tune"] |= {"epochs": 1, "num_virtual_tokens": 4}
    prompt["preprocess"]["splits"] = {"train": 0.65, "validation": 0.2, "test": 0.15}
    prompt["evaluate"] = {"few_shot": 2, "probes": {"rows": 4, "perturbations": ["case"]}}
    prompt |= {"trials": [{}], "source": {**prompt["source"], "path": ".retune/landing/ticket_priority"}}
    path.write_text(yaml.safe_dump(prompt, sort_keys=False), "utf-8")
    with environment_of(project):
        from loops import loop

        from retune.tasks.ingest import ingest

        (project / ".retune/landing" / NAME).mkdir(parents=True)
        (project / ".retune/landing" / NAME / "a.csv").write_text(
            landed(ROWS, (HERS, "high"), (TESTED, "low"), (QUARANTINED, "P1")), "utf-8"
        )
        assert ingest(NAME, "ingest", "test") is not None
        assert loop(NAME, "first") is not None
    return project
