"""The task of the DAG `ingest`: a prompt's landing zone in, a dataset revision out, if anything is new."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from retune.config import Prompt, load_prompt
from retune.data.forgotten import Forgotten
from retune.data.identity import keep_identities
from retune.data.ingest import QUARANTINE, ObjectResult, ingest_object, new_or_changed
from retune.data.landing import Landing, open_objects, shown
from retune.dvc_files import EMPTY_DATA
from retune.errors import ConflictError, StageError
from retune.ledger import Entry, Ledger
from retune.rewritten import DATASET, Rewritten
from retune.settings import Settings
from retune.store import s3_client
from retune.tasks.context import Json
from retune.workspace import Workspaces

__all__ = ["ingest"]

ATTEMPTS = 10
"""How often a lost race for the dataset ledger's head is rebased; other prompts ingest at the same time."""


def ingest(name: str, dag_run_id: str, by: str, log: Callable[[str], None] = print) -> Json | None:
    """Reads new or changed objects of one prompt and appends a dataset revision; None if nothing is new.

    Returns the revision's number and the rows of the prompt. Raises BadInputError on objects that cannot be read at all, StageError if
    an object was replaced while it was read (a retry reads it again). Retry: nothing is versioned twice.
    """
    settings = Settings.load()
    prompt = load_prompt(settings.prompts / f"{name}.yaml")
    workspaces = Workspaces(settings, log)
    ledger = Ledger(workspaces.store, DATASET)
    head = ledger.head()
    known = _known(head, name)
    landing = _landing(settings, prompt)
    for key, reason in landing.skipped:
        log(f"{key}: skipped, {reason}")
    changes = new_or_changed(landing.objects, known)
    skipped = dict(landing.skipped)
    for key in map(shown, changes.vanished):
        if key not in skipped:
            log(f"{key}: no longer in the landing zone; its rows stay")
    if not changes.read:
        log(f"{name}: nothing new in {prompt.source.path} ({len(changes.unchanged)} object(s), all known)")
        return None
    forgotten = Rewritten.of(workspaces.store).forgotten(name)
    with tempfile.TemporaryDirectory(prefix="retune-ingest-") as temporary:
        scratch = Path(temporary)
        results = []
        for sequence, item in enumerate(changes.read, max((o["sequence"] for o in known.values()), default=0) + 1):
            result = ingest_object(prompt, item, sequence, scratch, forgotten=forgotten)
            before = known.get(item.key)
            if head and before and before["part"] and result.part:
                lineage = workspaces.lineage(head.body["data"], head.n)
                old = workspaces.fetch(lineage, f"data/{name}/{before['part']}", scratch / "old" / before["part"])
                result = replace(result, part=keep_identities(old, scratch / result.part, scratch))
            _report(result, log)
            results.append(result)
        entry = _append(workspaces, prompt, results, forgotten, scratch, dag_run_id, by)
    rows = entry.body["rows"][name]
    log(f"{name}: dataset revision {entry.n}, {rows} rows")
    return {"prompt": name, "revision": entry.n, "rows": rows, "objects": [r.key for r in results]}


def _landing(settings: Settings, prompt: Prompt) -> Landing:
    """The prompt's landing zone; one inside Retune's own state is created, so that a fresh installation has somewhere to land."""
    source = prompt.source.path
    if source.startswith("s3://"):
        return open_objects(source, s3=s3_client(settings.s3_endpoint))
    folder = (settings.project / source).resolve()
    if folder.is_relative_to(settings.home):
        folder.mkdir(parents=True, exist_ok=True)
    return open_objects(source, root=settings.project)


def _report(result: ObjectResult, log: Callable[[str], None]) -> None:
    quarantined = sum(result.quarantined.values())
    forgotten = f" + {result.forgotten} forgotten" if result.forgotten else ""
    log(f"{result.key}: {result.rows} rows = {result.kept} kept + {result.duplicates} duplicates + {quarantined} quarantined{forgotten}")
    for assumption in result.assumptions:
        log(f"  assumed: {assumption}")
    for kind, count in sorted(result.quarantined.items()):
        log(f"  quarantined: {count} x {kind}")
    if any(result.redacted.values()):
        log("  redacted: " + ", ".join(f"{count} {kind}" for kind, count in sorted(result.redacted.items()) if count))


def _known(head: Entry | None, name: str) -> dict[str, Any]:
    return dict(head.body["objects"].get(name, {})) if head else {}


def _append(
    workspaces: Workspaces,
    prompt: Prompt,
    results: list[ObjectResult],
    forgotten: list[Forgotten],
    scratch: Path,
    dag_run_id: str,
    by: str,
) -> Entry:
    """Adds the parts to the revision of this moment and appends the ledger's entry; rebases if another prompt was quicker.

    `forgotten`: what was when the objects were read. Raises StageError if more was since: they must be read again.
    """
    name, ledger = prompt.name, Ledger(workspaces.store, DATASET)
    add: dict[str, Path] = {}
    records: Json = {}
    for result in results:
        files = {}
        if result.part:
            files[f"{name}/{result.part}"] = scratch / result.part
        if result.quarantine:
            files[f"_quarantine/{name}/{result.quarantine}"] = scratch / QUARANTINE / result.quarantine
        add |= files
        records[result.key] = result.to_json() | {"files": sorted(files)}
    for _ in range(ATTEMPTS):
        head = ledger.head()
        if Rewritten.of(workspaces.store).forgotten(name) != forgotten:
            raise StageError(f"rows of {name} were forgotten while objects were read that may hold them; run the ingest again")
        objects = _known(head, name)
        stale = {f for key in records if key in objects for f in objects[key]["files"]}
        objects |= records
        kept_files = {f for o in objects.values() for f in o["files"]}
        data = workspaces.add_data(head.body["data"] if head else EMPTY_DATA, add, tuple(sorted(stale - kept_files)))
        body = {
            "data": data,
            "rows": {**(head.body["rows"] if head else {}), name: sum(o["kept"] for o in objects.values())},
            "objects": {**(head.body["objects"] if head else {}), name: objects},
            "prompts_changed": [name],
            "dag_run_id": dag_run_id,
        }
        try:
            return ledger.append("revision", by, f"{len(results)} landed object(s) of {name}", body, head)
        except ConflictError:
            continue
    raise ConflictError(f"the dataset ledger changed {ATTEMPTS} times while {name} was ingested; run it again")
