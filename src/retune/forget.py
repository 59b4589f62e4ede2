"""Takes a person's rows out of everything that the store keeps of a prompt.

The rows are looked for in the parts of every dataset revision, then in whatever was made of these parts. What holds some is written anew
without them, an entry `forget` of the dataset ledger says which object took which one's place, and only then are the old ones deleted. So a
call that is killed before the entry has changed nothing, and what one that is killed after it left undone, any later call does: each
deletes everything that all entries name. The entry is also the revision from which on the rows are gone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import yaml

from retune.config import Prompt
from retune.data.forgotten import Forgotten
from retune.dvc_files import REMOTE, listing, md5_of, object_name, sections
from retune.errors import BadInputError
from retune.forget_files import Part, Selection, holds_examples, kept_part, mentions, quarantine_part, without_rows
from retune.ledger import Entry, Ledger, standing
from retune.objects import object_key
from retune.recorded import by_release
from retune.rewritten import DATASET, FORGET, Rewritten
from retune.settings import Settings
from retune.store import Store, StoreKeyError
from retune.workspace import Workspaces

__all__ = ["Plan", "Swept", "append", "plan", "sweep"]

QUARANTINE = "_quarantine/"
"""Begins the path of a part of quarantined rows under `data/`."""
SPLITS = ("train.parquet", "validation.parquet", "test.parquet")
PAGES = ("report.json", "profile.html")
"""Files of a dataset that quote near-duplicates; the figures in them were those of the rows that are gone."""
OF_ITS_OWN = ("adapter/adapter_model.safetensors", "classifier/model.safetensors", "examples/rows.jsonl", "model/model.safetensors")
"""Files of a release that hold what was tuned, or training rows. The others may be another release's as well."""


@dataclass
class Plan:
    """What is to be rewritten; nothing of it has been yet."""

    prompt: str
    head: Entry
    """Of the dataset ledger; the plan holds as long as it is."""
    rows: Forgotten
    ids: set[str] = field(default_factory=set)
    """`OBJECT:ROW` of each kept row."""
    quarantined: set[str] = field(default_factory=set)
    revisions: dict[int, dict[str, int]] = field(default_factory=dict)
    """Number -> rows less, kept and quarantined."""
    replaced: dict[str, str | None] = field(default_factory=dict)
    """As in `Rewritten`."""
    made: dict[str, bytes] = field(default_factory=dict)
    """md5 -> content that takes an old object's place."""
    parts: dict[str, Part] = field(default_factory=dict)
    """md5 of the old part -> the new one."""
    old_paths: dict[str, list[str]] = field(default_factory=dict)
    """md5 of the old part -> its paths under `data/`."""
    paths: dict[str, str | None] = field(default_factory=dict)
    """Path under `data/` -> new path."""
    tables: list[str] = field(default_factory=list)
    """Paths of the splits, predictions and probes that are rewritten; a path may stand there several times."""
    sections: list[str] = field(default_factory=list)
    """Keys of the section index that go."""
    releases_tuned: dict[str, str] = field(default_factory=dict)
    """Release tuned on some of the rows -> `champion`, `kept` or `deleted`."""
    releases_holding: dict[str, str] = field(default_factory=dict)
    """Likewise, of few-shot releases that hold some as they are."""

    @property
    def empty(self) -> bool:
        return not self.replaced

    @property
    def releases_deleted(self) -> list[str]:
        return sorted(r for fates in (self.releases_tuned, self.releases_holding) for r, fate in fates.items() if fate == "deleted")

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "rows": {"kept": len(self.ids), "quarantined": len(self.quarantined)},
            "ids": sorted({*self.ids, *self.quarantined}),
            "revisions": {str(n): taken for n, taken in sorted(self.revisions.items())},
            "parts": [{"path": old, "now": new} for old, new in sorted(self.paths.items())],
            "tables": {path: self.tables.count(path) for path in sorted(set(self.tables))},
            "objects": len(self.replaced),
            "sections": len(self.sections),
            "releases_tuned": self.releases_tuned,
            "releases_holding": self.releases_holding,
        }


def plan(workspaces: Workspaces, prompt: Prompt, selection: Selection, texts: Sequence[Sequence[str]] = (), releases: bool = False) -> Plan:
    """Looks for the rows that are named, every row with the same input texts, and those that earlier calls forgot.

    `texts`: input texts of rows, beside the selection. `releases`: those tuned on the rows go too, the champion apart. Writes nothing.
    Raises BadInputError without a dataset revision, ConfigError or StageError where the store cannot be read.
    """
    entries = Ledger(workspaces.store, DATASET).entries()
    if not entries:
        raise BadInputError("no dataset revision yet, so nothing to forget")
    scan = _Scan(workspaces, prompt, entries)
    found = Plan(prompt.name, entries[-1], Forgotten.new(prompt.inputs))
    named = [tuple(row) for row in texts]
    for md5 in scan.parts:
        if (part := scan.without(md5, selection, [])) is not None:
            named += part.texts(prompt.inputs)
    found.rows = found.rows.with_texts(named)
    _plan_parts(scan, found, selection, [found.rows, *scan.rewritten.forgotten(prompt.name)])
    _plan_listings(scan, found)
    _plan_derived(scan, found, releases)
    return found


class _Scan:
    """What the store keeps of a prompt, as it reads after all that was forgotten before."""

    def __init__(self, workspaces: Workspaces, prompt: Prompt, entries: list[Entry]) -> None:
        self.workspaces, self.prompt = workspaces, prompt
        self.rewritten = Rewritten.among(entries)
        self.entries = Ledger(workspaces.store, prompt.name).entries()
        self.listings: dict[int, tuple[str, dict[str, str]]] = {}
        """Revision -> hash and files of its folder `data`."""
        self.parts: dict[str, list[str]] = {}
        """md5 of a part of the prompt -> its paths."""
        for entry in entries:
            lineage = self.rewritten.current(workspaces.lineage(entry.body["data"], entry.n))
            (out,) = yaml.safe_load(lineage.data)["outs"]
            files = workspaces.files(lineage, "data")
            self.listings[entry.n] = out["md5"], files
            for path, md5 in files.items():
                if path.removeprefix(QUARANTINE).startswith(f"{prompt.name}/"):
                    self.parts.setdefault(md5, []).append(path)

    def get(self, md5: str) -> bytes | None:
        """None for an object that is gone, which holds no row."""
        try:
            return self.workspaces.objects.get(md5)
        except StoreKeyError:
            return None

    def without(self, md5: str, selection: Selection, forgotten: Sequence[Forgotten]) -> Part | None:
        content = self.get(md5)
        if content is None:
            return None
        of_kind = quarantine_part if self.parts[md5][0].startswith(QUARANTINE) else kept_part
        return of_kind(content, selection, forgotten)

    def outputs(self) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """Every output of the prompt's stages that an index entry (its key comes first) or the ledger names."""
        for key in self.workspaces.store.list(f"sections/{self.prompt.name}/"):
            for out in json.loads(self.workspaces.store.get(key))["section"].get("outs", []):
                if (now := self.rewritten.out(out)) is not None:
                    yield key, now
        for entry in self.entries:
            lock = (entry.body.get("lineage") or {}).get("lock", "")
            of_prompt = [s for name, s in sections(lock).items() if name.endswith(f"@{self.prompt.name}")]
            champion = entry.body.get("champion") or {}
            for out in [*(out for section in of_prompt for out in section.get("outs", [])), *champion.get("outs", [])]:
                if (now := self.rewritten.out(out)) is not None:
                    yield None, now

    def files(self, md5: str) -> dict[str, str]:
        listed = self.get(md5)
        return {item["relpath"]: item["md5"] for item in json.loads(listed)} if listed is not None else {}


def _plan_parts(scan: _Scan, found: Plan, selection: Selection, forgotten: Sequence[Forgotten]) -> None:
    for md5, paths in scan.parts.items():
        part = scan.without(md5, selection, forgotten)
        if part is None:
            continue
        found.parts[md5] = part
        found.old_paths[md5] = paths
        (found.quarantined if paths[0].startswith(QUARANTINE) else found.ids).update(part.ids)
        found.replaced[md5] = md5_of(part.content) if part.name else None
        if part.name:
            found.made[md5_of(part.content)] = part.content
        for path in paths:
            found.paths[path] = f"{path.rpartition('/')[0]}/{part.name}" if part.name else None


def _plan_listings(scan: _Scan, found: Plan) -> None:
    for n, (folder, files) in scan.listings.items():
        touched = {path: md5 for path, md5 in files.items() if md5 in found.parts}
        if not touched:
            continue
        kinds = {path: "quarantined" if path.startswith(QUARANTINE) else "kept" for path in touched}
        found.revisions[n] = {
            kind: sum(len(found.parts[md5].removed) for path, md5 in touched.items() if kinds[path] == kind)
            for kind in ("kept", "quarantined")
        }
        found.replaced[folder] = _listing(found, {found.paths.get(path, path): found.replaced.get(md5, md5) for path, md5 in files.items()})


def _listing(found: Plan, files: Mapping[str | None, str | None]) -> str:
    """Hash of the listing of those files that are left."""
    body = listing({path: md5 for path, md5 in files.items() if path is not None and md5 is not None})
    md5 = md5_of(body) + ".dir"
    found.made[md5] = body
    return md5


def _plan_derived(scan: _Scan, found: Plan, releases: bool) -> None:
    """Splits, predictions, probes and releases; rows of an input leave wherever it stands, with its other references."""
    ids = found.ids | {row for entry in scan.rewritten.entries if entry.body["forget"]["prompt"] == found.prompt for row in _ids(entry)}
    forgotten = [found.rows, *scan.rewritten.forgotten(found.prompt)]
    outputs = list(scan.outputs())
    if not ids:
        return
    holding: dict[str, dict[str, str]] = {}
    folders: dict[str, dict[str, str]] = {}
    trained_on: set[str] = set()
    done: set[str] = set()
    for _, out in outputs:
        path, md5 = out["path"].removeprefix(f"artifacts/{found.prompt}/"), out["md5"]
        if md5 in done:
            continue
        done.add(md5)
        if path == "dataset":
            if _plan_dataset(scan, found, md5, ids, forgotten):
                trained_on.add(md5)
        elif path in ("predictions.parquet", "probes.parquet"):
            _plan_table(scan, found, path, md5, ids, forgotten)
        elif path == "release":
            files = folders[md5] = scan.files(md5)
            lines = scan.get(files["examples/rows.jsonl"]) if "examples/rows.jsonl" in files else None
            if lines is not None and holds_examples(lines, ids, forgotten):
                holding[md5] = files
    _plan_releases(scan, found, holding, folders, trained_on, releases)
    found.sections = sorted({key for key, out in outputs if key is not None and out["md5"] in found.replaced})


def _ids(entry: Entry) -> list[str]:
    return list(entry.body["forget"]["ids"])


def _plan_table(scan: _Scan, found: Plan, path: str, md5: str, ids: set[str], forgotten: Sequence[Forgotten]) -> str:
    """md5 of the table without the rows; the same where it has none of them."""
    if md5 in found.replaced:
        return found.replaced[md5] or md5
    content = scan.get(md5)
    left = without_rows(content, ids, forgotten) if content is not None else None
    if left is None:
        return md5
    found.tables.append(path)
    found.replaced[md5] = md5_of(left)
    found.made[md5_of(left)] = left
    return md5_of(left)


def _plan_dataset(scan: _Scan, found: Plan, md5: str, ids: set[str], forgotten: Sequence[Forgotten]) -> bool:
    """Whether a release may have been tuned on some of the rows: they stand in the training or validation split."""
    files = scan.files(md5)
    now = {name: _plan_table(scan, found, f"dataset/{name}", files[name], ids, forgotten) for name in SPLITS if name in files}
    report = scan.get(files["report.json"]) if "report.json" in files else None
    if all(files[name] == now[name] for name in now) and not (report is not None and mentions(report, ids)):
        return False
    found.replaced |= {files[name]: None for name in PAGES if name in files}
    left: dict[str | None, str | None] = {name: now.get(name, of) for name, of in files.items() if name not in PAGES}
    found.replaced[md5] = _listing(found, left)
    return any(files[name] != now[name] for name in now if name != "test.parquet")


def _plan_releases(
    scan: _Scan,
    found: Plan,
    holding: Mapping[str, Mapping[str, str]],
    folders: Mapping[str, Mapping[str, str]],
    trained_on: set[str],
    releases: bool,
) -> None:
    now = standing(scan.entries).champion
    champion = now["release"] if now else None
    gone: set[str] = set()
    for md5, files in holding.items():
        manifest = scan.get(files["manifest.json"])
        release = hashlib.sha256(manifest).hexdigest() if manifest is not None else md5
        found.releases_holding[release] = "champion" if release == champion else "deleted"
        gone |= {md5} if release != champion else set()
    earlier = {r for e in scan.rewritten.entries if e.body["forget"]["prompt"] == found.prompt for r in e.body["forget"]["releases_tuned"]}
    for release, recorded in by_release(found.prompt, scan.entries).items():
        if scan.entries[recorded.entry].kind == "found" or release in {*found.releases_holding, *scan.rewritten.deleted()}:
            continue  # the template alone has seen no row
        lock = sections(scan.rewritten.current(recorded.lineage).lock)
        of = {stage: lock.get(f"{stage}@{found.prompt}", {}).get("outs", []) for stage in ("preprocess", "tune")}
        asked = releases and release in earlier and release != champion
        if not (asked or any(out["md5"] in trained_on for out in of["preprocess"])):
            continue
        fate = "champion" if release == champion else "deleted" if releases else "kept"
        found.releases_tuned[release] = fate
        gone |= {out["md5"] for out in of["tune"] if fate == "deleted" and out["path"].endswith("/release")}
    stays = {of for md5, files in folders.items() if md5 not in gone for of in files.values()}
    for md5 in gone:
        own = {of for name, of in folders.get(md5, {}).items() if name in OF_ITS_OWN}
        found.replaced |= dict.fromkeys([md5, *sorted(own - stays)])


def append(workspaces: Workspaces, found: Plan, by: str, reason: str) -> Entry:
    """Writes what takes the place of the old objects, then the entry. Raises ConflictError if the data changed since the plan was made."""
    for md5, content in found.made.items():
        workspaces.store.put(object_key(md5), content)
    head = found.head.body
    data = yaml.safe_load(head["data"])
    for out in data["outs"]:
        if now := found.replaced.get(out["md5"]):
            files = json.loads(found.made[now])
            out |= {"md5": now, "nfiles": len(files)}
            out.pop("size", None)
    objects = {key: _rewritten_object(found, record) for key, record in head["objects"].get(found.prompt, {}).items()}
    body = {
        "data": yaml.safe_dump(data, sort_keys=False),
        "rows": {**head["rows"], found.prompt: sum(record["kept"] for record in objects.values())},
        "objects": {**head["objects"], found.prompt: objects},
        "prompts_changed": [found.prompt],
        "forget": {
            "prompt": found.prompt,
            "rows": found.rows.to_json(),
            "ids": sorted(found.ids),
            "quarantined": sorted(found.quarantined),
            "revisions": {str(n): taken for n, taken in sorted(found.revisions.items())},
            "replaced": found.replaced,
            "sections": found.sections,
            "releases_tuned": found.releases_tuned,
            "releases_holding": found.releases_holding,
            "releases_deleted": found.releases_deleted,
        },
    }
    return Ledger(workspaces.store, DATASET).append(FORGET, by, reason, body, found.head)


def _rewritten_object(found: Plan, record: dict[str, Any]) -> dict[str, Any]:
    """What became of a landed object, with its forgotten rows counted as such: rows = kept + duplicates + quarantined + forgotten."""
    record = {**record, "quarantined": dict(record["quarantined"])}
    by_path = {path: found.parts[md5] for md5, paths in found.old_paths.items() for path in paths}
    for path in [path for path in record["files"] if path in by_path]:
        part, now = by_path[path], found.paths[path]
        name = now.rpartition("/")[2] if now else None
        if path.startswith(QUARANTINE):
            for kind in part.removed["kind"]:
                record["quarantined"][kind] -= 1
            record["quarantine"] = name
        else:
            record["kept"] -= len(part.removed)
            record["part"] = name
        record["forgotten"] = record.get("forgotten", 0) + len(part.removed)
        record["files"] = sorted({*(f for f in record["files"] if f != path), *([now] if now else [])})
    return record


@dataclass
class Swept:
    """What a sweep deleted."""

    objects: list[str] = field(default_factory=list)
    """md5s, from the store."""
    cached: list[str] = field(default_factory=list)
    """md5s, from this host's caches."""
    sections: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.objects or self.cached or self.sections or self.checkpoints)

    def to_json(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in ("objects", "cached", "sections", "checkpoints")}


def sweep(store: Store, settings: Settings, rewritten: Rewritten, dry_run: bool = False) -> Swept:
    """Deletes everything that any entry says was rewritten or goes, from the store and from this host's caches. Idempotent."""
    done = Swept()

    def delete(key: str) -> None:
        if not dry_run:
            store.delete(key)

    gone = set(rewritten.replaced) - {md5 for md5 in rewritten.replaced.values() if md5}
    wanted = {object_key(md5): md5 for md5 in gone}
    for key in [key for key in store.list(f"{REMOTE}/files/") if key in wanted]:
        delete(key)
        done.objects.append(wanted[key])
    indexed = {key for entry in rewritten.entries for key in entry.body["forget"]["sections"]}
    for key in [key for key in (store.list("sections/") if indexed else ()) if key in indexed]:
        # An entry of the same key may have been made since, of other objects.
        if any(out["md5"] in gone for out in json.loads(store.get(key))["section"].get("outs", [])):
            delete(key)
            done.sections.append(key)
    latest = {entry.body["forget"]["prompt"]: datetime.fromisoformat(entry.at).timestamp() for entry in rewritten.entries}
    for prompt, moment in sorted(latest.items()):
        for item in store.stored(f"checkpoints/{prompt}/"):
            if item.modified < moment:  # a later one is of a run without the rows
                delete(item.key)
                done.checkpoints.append(item.key)
    for cache in (settings.cache, settings.project / ".dvc/cache"):
        for md5 in sorted(gone):
            place = cache / object_name(md5)
            if place.is_file():
                if not dry_run:
                    place.unlink()
                done.cached.append(md5)
    return done
