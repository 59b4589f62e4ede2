"""Takes a person's rows out of everything that the store keeps of a prompt.

The rows are looked for in the parts of every dataset revision, then in whatever was made of these parts. What holds some is written anew
without them, an entry `forget` of the dataset ledger says which object took which one's place, and only then are the old ones deleted. So a
call that is killed before the entry has changed nothing, and what one that is killed after it left undone, any later call does: each
deletes everything that all entries name. The entry is also the revision from which on the rows are gone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import yaml

from retune.config import Prompt
from retune.data.forgotten import Forgotten
from retune.dvc_files import REMOTE, listing, md5_of, object_name, outs, sections
from retune.errors import BadInputError
from retune.forget_files import Part, Selection, holds_examples, kept_part, mentions, quarantine_part, without_rows
from retune.ledger import Entry, Ledger, standing
from retune.objects import Objects, object_key
from retune.recorded import by_release
from retune.records import Lineage
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
    older: list[Forgotten] = field(default_factory=list)
    """Rows of parts that are older than an input field, known by the fields that they have."""
    also_in: list[str] = field(default_factory=list)
    """Other prompts that keep the same parts, of the same source: theirs stay as they are."""
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
            "also_in": self.also_in,
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
    named = {found.rows.inputs: [tuple(row) for row in texts]}
    for md5 in scan.parts:
        if (part := scan.without(md5, selection, [])) is not None and (has := part.fields(prompt.inputs)):
            named.setdefault(has, []).extend(part.texts(has))
    found.rows = found.rows.with_texts(named.pop(found.rows.inputs))
    found.older = [Forgotten.new(inputs).with_texts(rows) for inputs, rows in named.items()]
    _plan_parts(scan, found, selection, _known(scan, found))
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
        self.others: dict[str, set[str]] = {}
        """md5 of a part -> other prompts that keep it."""
        for entry in entries:
            lineage = self.rewritten.current(workspaces.lineage(entry.body["data"], entry.n))
            (out,) = yaml.safe_load(lineage.data)["outs"]
            files = workspaces.files(lineage, "data")
            self.listings[entry.n] = out["md5"], files
            for path, md5 in files.items():
                if (name := path.removeprefix(QUARANTINE).partition("/")[0]) != prompt.name:
                    self.others.setdefault(md5, set()).add(name)
                elif path not in self.parts.get(md5, ()):
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

    def sections(self) -> dict[str, dict[str, Any]]:
        """Key of the section index -> section, of the prompt's stages."""
        store = self.workspaces.store
        return {key: json.loads(store.get(key))["section"] for key in store.list(f"sections/{self.prompt.name}/")}

    def files(self, md5: str) -> dict[str, str]:
        listed = self.get(md5)
        return {item["relpath"]: item["md5"] for item in json.loads(listed)} if listed is not None else {}


def _recorded(rewritten: Rewritten, prompt: str, entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """Every output of a prompt's stages that its ledger names, as it reads now."""
    for entry in entries:
        lock = (entry.body.get("lineage") or {}).get("lock", "")
        of_prompt = [section for name, section in sections(lock).items() if name.endswith(f"@{prompt}")]
        champion = entry.body.get("champion") or {}
        yield from rewritten.outs([*(out for section in of_prompt for out in section.get("outs", [])), *champion.get("outs", [])], prompt)


def _known(scan: _Scan, found: Plan) -> list[Forgotten]:
    """By what rows are known that this call forgets, or an earlier one did."""
    return [found.rows, *found.older, *scan.rewritten.forgotten(found.prompt)]


def _plan_parts(scan: _Scan, found: Plan, selection: Selection, forgotten: Sequence[Forgotten]) -> None:
    for md5, paths in scan.parts.items():
        part = scan.without(md5, selection, forgotten)
        if part is None:
            continue
        found.parts[md5] = part
        found.also_in = sorted({*found.also_in, *scan.others.get(md5, ())})
        found.old_paths[md5] = paths
        (found.quarantined if paths[0].startswith(QUARANTINE) else found.ids).update(part.ids)
        found.replaced[md5] = md5_of(part.content) if part.name else None
        if part.name:
            found.made[md5_of(part.content)] = part.content
        for path in paths:
            found.paths[path] = f"{path.rpartition('/')[0]}/{part.name}" if part.name else None


def _plan_listings(scan: _Scan, found: Plan) -> None:
    for n, (folder, files) in scan.listings.items():
        touched = {path: md5 for path, md5 in files.items() if path in found.paths}
        if not touched:
            continue
        kinds = {path: "quarantined" if path.startswith(QUARANTINE) else "kept" for path in touched}
        found.revisions[n] = {
            kind: sum(len(found.parts[md5].removed) for path, md5 in touched.items() if kinds[path] == kind)
            for kind in ("kept", "quarantined")
        }
        left = {found.paths.get(path, path): found.replaced[md5] if path in touched else md5 for path, md5 in files.items()}
        found.replaced[folder] = _listing(found, left)


def _listing(found: Plan, files: Mapping[str | None, str | None]) -> str:
    """Hash of the listing of those files that are left."""
    body = listing({path: md5 for path, md5 in files.items() if path is not None and md5 is not None})
    md5 = md5_of(body) + ".dir"
    found.made[md5] = body
    return md5


def _plan_derived(scan: _Scan, found: Plan, releases: bool) -> None:
    """Splits, predictions, probes and releases; rows of an input leave wherever it stands, with its other references.

    What the section index alone names is deleted rather than rewritten: with its section, nothing would name what took its place.
    """
    ids = found.ids | {row for entry in scan.rewritten.entries if entry.body["forget"]["prompt"] == found.prompt for row in _ids(entry)}
    if not ids:
        return
    forgotten = _known(scan, found)
    recorded = list(_recorded(scan.rewritten, found.prompt, scan.entries))
    index = scan.sections()
    indexed = {key: scan.rewritten.outs(section.get("outs", []), found.prompt) for key, section in index.items()}
    stay = {out["md5"] for out in recorded}
    holding: dict[str, dict[str, str]] = {}
    folders: dict[str, dict[str, str]] = {}
    trained_on: set[str] = set()
    done: set[str] = set()
    for out in [*recorded, *(out for made in indexed.values() for out in made)]:
        path, md5 = out["path"].removeprefix(f"artifacts/{found.prompt}/"), out["md5"]
        if md5 in done:
            continue
        done.add(md5)
        if path == "dataset":
            if _plan_dataset(scan, found, md5, ids, forgotten, md5 in stay):
                trained_on.add(md5)
        elif path in ("predictions.parquet", "probes.parquet"):
            _plan_table(scan, found, path, md5, ids, forgotten, md5 in stay)
        elif path == "release":
            files = folders[md5] = scan.files(md5)
            lines = scan.get(files["examples/rows.jsonl"]) if "examples/rows.jsonl" in files else None
            if lines is not None and holds_examples(lines, ids, forgotten):
                holding[md5] = files
    trials: set[str] = set()
    if releases:
        before = trained_on | set(scan.rewritten.replaced_in(found.prompt))
        of_trials = [key for key, section in index.items() if any(dep.get("md5") in before for dep in section.get("deps", []))]
        trials = {out["md5"] for key in of_trials for out in indexed[key] if out["path"].endswith("/release")} - stay
    _plan_releases(scan, found, holding, folders, trained_on, trials, releases)
    found.sections = sorted(key for key, made in indexed.items() if any(out["md5"] in found.replaced for out in made))


def _ids(entry: Entry) -> list[str]:
    return list(entry.body["forget"]["ids"])


def _plan_table(scan: _Scan, found: Plan, path: str, md5: str, ids: set[str], forgotten: Sequence[Forgotten], stays: bool) -> str | None:
    """md5 of the table without the rows; the same where it has none of them, None where nothing is to take its place."""
    if md5 in found.replaced:
        return found.replaced[md5]
    content = scan.get(md5)
    left = without_rows(content, ids, forgotten) if content is not None else None
    if left is None:
        return md5
    found.tables.append(path)
    found.replaced[md5] = md5_of(left) if stays else None
    if stays:
        found.made[md5_of(left)] = left
    return found.replaced[md5]


def _plan_dataset(scan: _Scan, found: Plan, md5: str, ids: set[str], forgotten: Sequence[Forgotten], stays: bool) -> bool:
    """Whether a release may have been tuned on some of the rows: they stand in the training or validation split."""
    files = scan.files(md5)
    now = {name: _plan_table(scan, found, f"dataset/{name}", files[name], ids, forgotten, stays) for name in SPLITS if name in files}
    report = scan.get(files["report.json"]) if "report.json" in files else None
    if all(files[name] == now[name] for name in now) and not (report is not None and mentions(report, ids)):
        return False
    found.replaced |= {files[name]: None for name in PAGES if name in files}
    left: dict[str | None, str | None] = {name: now.get(name, of) for name, of in files.items() if name not in PAGES}
    found.replaced[md5] = _listing(found, left) if stays else None
    return any(files[name] != now[name] for name in now if name != "test.parquet")


def _plan_releases(
    scan: _Scan,
    found: Plan,
    holding: Mapping[str, Mapping[str, str]],
    folders: Mapping[str, Mapping[str, str]],
    trained_on: set[str],
    trials: set[str],
    releases: bool,
) -> None:
    now = standing(scan.entries).champion
    champion = now["release"] if now else None
    gone: set[str] = set()
    for md5 in trials - set(holding):
        found.releases_tuned[_release(scan, folders[md5], md5)] = "deleted"
        gone.add(md5)
    for md5, files in holding.items():
        release = _release(scan, files, md5)
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


def _release(scan: _Scan, files: Mapping[str, str], md5: str) -> str:
    """Id of the release in a folder; the folder's hash where its manifest is gone."""
    manifest = scan.get(files["manifest.json"]) if "manifest.json" in files else None
    return hashlib.sha256(manifest).hexdigest() if manifest is not None else md5


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
            **({"rows_of_older_parts": [rows.to_json() for rows in found.older]} if found.older else {}),
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

    caches = (settings.cache, settings.project / ".dvc/cache")
    old = set(rewritten.replaced) - {md5 for md5 in rewritten.replaced.values() if md5}
    gone = set(old)
    wanted = {object_key(md5): md5 for md5 in gone}
    stored = [key for key in store.list(f"{REMOTE}/files/") if key in wanted]
    if stored or any((cache / object_name(md5)).is_file() for cache in caches for md5 in gone):
        gone -= _needed(store, settings, rewritten)
    for key in [key for key in stored if wanted[key] in gone]:
        delete(key)
        done.objects.append(wanted[key])
    indexed = {key for entry in rewritten.entries for key in entry.body["forget"]["sections"]}
    for key in [key for key in (store.list("sections/") if indexed else ()) if key in indexed]:
        # An entry of the same key may have been made since, of other objects.
        if any(out["md5"] in old for out in json.loads(store.get(key))["section"].get("outs", [])):
            delete(key)
            done.sections.append(key)
    latest = {entry.body["forget"]["prompt"]: datetime.fromisoformat(entry.at).timestamp() for entry in rewritten.entries}
    for prompt, moment in sorted(latest.items()):
        for item in store.stored(f"checkpoints/{prompt}/"):
            if item.modified < moment:  # a later one is of a run without the rows
                delete(item.key)
                done.checkpoints.append(item.key)
    for cache in caches:
        for md5 in sorted(gone):
            place = cache / object_name(md5)
            if place.is_file():
                if not dry_run:
                    place.unlink()
                done.cached.append(md5)
    return done


def _needed(store: Store, settings: Settings, rewritten: Rewritten) -> set[str]:
    """Every object that any prompt's data, section index or ledger leads to, as they read now: two prompts on one source have objects in
    common, and what one of them forgot may be another's still."""
    objects = Objects(store, settings.cache)
    named = set()
    for entry in Ledger(store, DATASET).entries():
        named |= {out["md5"] for out in outs(rewritten.current(Lineage(entry.body["data"], "", {}, "", False, "")))}
    keys = [key.split("/") for key in [*store.list("ledger/"), *store.list("sections/")]]
    for prompt in sorted({name for _, name, *_ in keys} - {DATASET}):
        named |= {out["md5"] for out in _recorded(rewritten, prompt, Ledger(store, prompt).entries())}
        for key in store.list(f"sections/{prompt}/"):
            with suppress(StoreKeyError):  # deleted since it was listed
                named |= {out["md5"] for out in rewritten.outs(json.loads(store.get(key))["section"].get("outs", []), prompt)}
    for md5 in [md5 for md5 in named if md5.endswith(".dir")]:
        with suppress(StoreKeyError):
            named |= {item["md5"] for item in json.loads(objects.get(md5))}
    return named
