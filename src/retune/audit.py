"""The whole history of a prompt, from its ledger and that of the data, as one document for whoever must sign it.

Everything in it stands in the two ledgers, owner and intended use apart: the same ledgers give the same document, and neither MLflow nor
Airflow has to be there. What an entry holds and this module does not know is shown as it is, so that no evidence is left out.
"""

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from retune.config import Prompt, canonical_json
from retune.document import Block, Bullets, Code, Facts, Heading, Inline, Link, Signature, Table, Text
from retune.errors import BadInputError
from retune.evaluation.roles import ROLE_TITLES
from retune.ledger import Entry, Ledger, Standing, looks_before, standing
from retune.store import Store

__all__ = ["Audit", "audit", "blocks", "title"]

DATASET = "dataset"
FINGERPRINT = 12
"""Digits of a hash where the whole of it stands elsewhere in the document."""
RELEASES = {"baseline": "baseline", "champion": "champion_before", "candidate": "candidate"}
"""Role -> where a decision's entry has the release."""
SHOWN = {
    *("decision", "candidate", "champion", "champion_before", "baseline", "lineage", "look", "fingerprint", "dag_run_id", "mlflow_run_id"),
    *("dataset_revision", "rows", "triggered", "from", "to", "left", "answer", "release"),
}
"""Fields of an entry that have a place of their own."""
COUNTED = ("quarantined", "redacted")
"""Of a landed object, the counts by kind."""
COMPARISON = {
    "metric": "Metric",
    "candidate": "Candidate",
    "champion": "Champion",
    "gain": "Gain, positive where the candidate is better",
    "low": "Lower end of the gain's interval",
    "high": "Upper end",
    "confidence": "Confidence of each end",
    "p_better": "Chance of such a gain or a larger one, were both equally good",
    "p_worse": "Chance of such a gain or a smaller one",
    "won": "Rows that the candidate alone has right",
    "lost": "Rows that the champion alone has right",
    "won_low": "Of those rows the candidate's share, lower end of its exact interval",
    "won_high": "Upper end of that",
    "mcnemar": "McNemar's exact test on those rows, two-sided p",
    "rows": "Test rows",
    "resamples": "Bootstrap resamples",
}


@dataclass(frozen=True)
class Audit:
    """What the ledgers hold of a prompt, and whether they hold together."""

    prompt: Prompt
    entries: list[Entry]
    """Those of the prompt's ledger that can be read, oldest first."""
    revisions: list[Entry]
    """Those of the dataset ledger that `entries` refer to."""
    heads: dict[str, Entry]
    """Ledger -> its last entry; nothing for an empty one."""
    broken: dict[int, str]
    """Number of an entry of the prompt's ledger at which the chain does not hold -> why."""
    problems: list[str]
    """Everything that does not hold, that of the dataset ledger included."""

    @property
    def standing(self) -> Standing:
        return standing(self.entries)

    def to_json(self) -> dict[str, Any]:
        now = self.standing
        return {
            "prompt": self.prompt.name,
            "owner": self.prompt.owner,
            "intended_use": self.prompt.intended_use,
            "verified": not self.problems,
            "problems": self.problems,
            "heads": {name: {"n": head.n, "sha256": head.sha256, "at": head.at} for name, head in self.heads.items()},
            "kinds": dict(Counter(entry.kind for entry in self.entries)),
            "champion": now.champion,
            "since": now.since,
            "barred": sorted(now.barred),
            "entries": [asdict(entry) for entry in self.entries],
            "revisions": [asdict(entry) for entry in self.revisions],
        }


def audit(store: Store, prompt: Prompt) -> Audit:
    """Reads and verifies both ledgers. A chain that does not hold is no error here: what can be read of it comes with what is wrong.

    Raises BadInputError for a prompt of which nothing was recorded.
    """
    readable, broken = Ledger(store, prompt.name).survey()
    if not readable and not broken:
        raise BadInputError(f"the ledger of {prompt.name} is empty: nothing was released yet; see `retune status`")
    entries: list[Entry] = []
    for entry in readable:
        try:
            deque(_entry(entry, entries), maxlen=0)
            entries.append(entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # somebody wrote it by hand
            broken.setdefault(entry.n, f"ledger {prompt.name}: entry {entry.n} is not of the shape that Retune writes: {error!r}")
    revisions, damaged = Ledger(store, DATASET).survey()
    used = dict.fromkeys(n for entry in entries if (n := _revision(entry)) is not None)
    known = {revision.n: revision for revision in revisions}
    lost = [
        f"the ledger {DATASET} has no revision {n}, which entries of {prompt.name} refer to" for n in sorted(used.keys() - known.keys())
    ]
    return Audit(
        prompt=prompt,
        entries=entries,
        revisions=[known[n] for n in sorted(used.keys() & known.keys())],
        heads={name: found[-1] for name, found in ((prompt.name, entries), (DATASET, revisions)) if found},
        broken=broken,
        problems=[*(broken[n] for n in sorted(broken)), *(damaged[n] for n in sorted(damaged)), *lost],
    )


def title(prompt: Prompt) -> str:
    return f"History of the prompt {prompt.name}"


def blocks(found: Audit) -> Iterator[Block]:
    """The document: what it is and whether it can be trusted, every entry, the data behind them, what it cannot show, a place to sign."""
    yield from _summary(found)
    yield Heading(2, "Entries, oldest first")
    numbers = {entry.n: entry for entry in found.entries}
    for n in sorted({*numbers, *found.broken}):
        entry = numbers.get(n)
        yield Heading(3, f"Entry {n}: {entry.kind if entry else 'cannot be read'}", f"entry-{n}")
        if n in found.broken:
            yield Text([found.broken[n]], "bad")
        if entry:
            yield from _entry(entry, [before for before in found.entries if before.n < n])
    yield from _revisions(found)
    yield from _ending(found)


def _summary(found: Audit) -> Iterator[Block]:
    prompt, now = found.prompt, found.standing
    yield Text(
        [
            f"Every decision on the prompt {prompt.name} with the evidence that it was taken on, as recorded in its ledger: an "
            "append-only list in which each entry holds the sha256 of the one before. Times are UTC, by the clock of whoever appended."
        ]
    )
    if found.problems:
        yield Text(
            [f"THE RECORD DOES NOT VERIFY. {len(found.problems)} problem(s); nothing below can be relied on before they are explained."],
            "bad",
        )
        yield Bullets(found.problems)
    else:
        yield Text([_verified(found)], "good")
    heads: list[tuple[str, Sequence[Inline]]] = [
        (f"Head of the ledger {name}", [f"entry {head.n}, sha256 ", Code(head.sha256)]) for name, head in found.heads.items()
    ]
    yield Facts(
        [
            ("Description", [prompt.description or "none given"]),
            ("Owner", [prompt.owner or "none given"]),
            ("Intended use", [prompt.intended_use or "none given"]),
            ("Period", [f"{found.entries[0].at} to {found.entries[-1].at}" if found.entries else "no entry can be read"]),
            *heads,
            ("Entries", [", ".join(f"{count} {kind}" for kind, count in Counter(entry.kind for entry in found.entries).items())]),
            ("Champion", [*_release(now.champion), f", since {now.since}"] if now.champion else ["none"]),
            ("Barred", _listed([_release(_known(found.entries, release)) for release in sorted(now.barred)])),
        ]
    )
    rows: list[list[Inline]] = [
        [Link(str(entry.n), f"#entry-{entry.n}"), entry.at, entry.kind, entry.by, entry.reason, Code(entry.sha256[:FINGERPRINT])]
        for entry in found.entries
    ]
    yield Table(["entry", "time", "kind", "who", "reason", "sha256"], rows)


def _verified(found: Audit) -> str:
    chains = " and ".join(f"{head.n + 1} of the ledger {name}" for name, head in found.heads.items())
    return (
        f"The record verifies. Every entry was read ({chains}), its bytes were hashed with sha256, and each hash is the one that the "
        "next entry recorded. The heads' hashes below pin all of it: whoever signs keeps them, and can tell later whether an entry up "
        "to here was changed."
    )


def _entry(entry: Entry, before: Sequence[Entry]) -> Iterator[Block]:
    body = entry.body
    yield Facts(
        [
            ("Time", [entry.at]),
            ("Who", [entry.by]),
            ("Reason", [entry.reason]),
            *_moves(entry, before),
            ("sha256", [Code(entry.sha256)]),
        ]
    )
    if decision := body.get("decision"):
        yield from _decision(decision, body)
    if evidence := list(_evidence(body, before)):
        yield Heading(4, "Where it comes from")
        yield Facts(evidence)
    for name in sorted(body.keys() - SHOWN):
        if body[name] not in (None, {}, []):
            yield Heading(4, name.replace("_", " ").capitalize())
            yield _anything(body[name])


def _moves(entry: Entry, before: Sequence[Entry]) -> Iterator[tuple[str, Sequence[Inline]]]:
    """Which release came, which left, and who was asked."""
    body, champion = entry.body, entry.body.get("champion")
    left = standing(before).champion
    if champion and (left is None or left["release"] != champion["release"]):
        yield "Champion from here on", _release(champion)
        yield "Champion until then", _release(left)
        if entry.kind == "rollback":
            yield "Barred", _release(left)
    elif champion:
        yield "Champion stays", _release(champion)
    if entry.kind == "unbar":
        yield "No longer barred", _release(_known(before, body["release"]))
    if decision := body.get("decision"):
        answers = [gate["reason"] for gate in decision["gates"] if gate["name"] == "approval"]
        yield "Approval", ["; ".join(answers) or "no person was asked"]
    if answer := body.get("answer"):
        yield "Chosen by", [", ".join(f"{name} {value}" for name, value in sorted(answer.items()) if value)]


def _decision(decision: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading(4, f"Verdict: {decision['verdict']}")
    yield Bullets(decision["reasons"] or ["No reason was recorded."])
    yield Heading(4, "Gates")
    yield Table(["gate", "outcome", "value", "interval", "threshold", "reason"], [_gate(gate) for gate in decision["gates"]])
    judged: dict[str, Mapping[str, Any]] = {role: body[field] for role, field in RELEASES.items() if body.get(field)}
    yield Heading(4, "Releases, on the same test rows")
    yield Facts([(ROLE_TITLES[role].capitalize(), _release(release)) for role, release in judged.items()])
    names = dict.fromkeys(name for release in judged.values() for name in release.get("metrics") or {})
    shown = [[name, *(_value((release.get("metrics") or {}).get(name)) for release in judged.values())] for name in names]
    yield Table(["metric", *(ROLE_TITLES[role] for role in judged)], shown)
    yield Heading(4, "Comparison of candidate and champion")
    if compared := decision["comparison"]:
        fields = [*(name for name in COMPARISON if name in compared), *sorted(compared.keys() - COMPARISON.keys())]
        yield Facts([(COMPARISON.get(name) or name.replace("_", " ").capitalize(), [_value(compared[name])]) for name in fields])
    else:
        yield Text(["None could be made."])


def _gate(gate: Mapping[str, Any]) -> list[Inline]:
    interval = "" if gate["low"] is None and gate["high"] is None else f"{_value(gate['low'])} to {_value(gate['high'])}"
    outcome = "passed" if gate["passed"] else f"failed: {gate['on_fail']}"
    optional = ["" if gate[name] is None else _value(gate[name]) for name in ("value", "threshold")]
    return [gate["name"], outcome, optional[0], interval, optional[1], gate["reason"]]


def _evidence(body: Mapping[str, Any], before: Sequence[Entry]) -> Iterator[tuple[str, Sequence[Inline]]]:
    if trial := (body.get("candidate") or {}).get("trial"):
        yield "Trial", [trial["name"]]
    if look := body.get("look"):
        others = looks_before(before, look)
        yield (
            "Looks at the test split",
            [
                f"this comparison takes {100 * look['takes']:.3g} % of chance; {len(others)} other(s) before it on test split ",
                Code(look["split"][:FINGERPRINT]),
                f" had taken {100 * sum(others.values()):.3g} %",
            ],
        )
    if lineage := body.get("lineage"):
        revision = lineage["revision"]
        yield (
            "Dataset revision",
            [Link(str(revision), f"#revision-{revision}"), f", {body['rows']:,} rows of the prompt" if "rows" in body else ""],
        )
        yield "Code", ["commit ", Code(lineage["commit"]), ", WITH UNCOMMITTED CHANGES" if lineage["dirty"] else ", nothing uncommitted"]
        yield "Environment", ["lock file's sha256 ", Code(lineage["environment"])]
        yield "Overrides", [Code(json.dumps(lineage["overrides"], ensure_ascii=False)) if lineage["overrides"] else "none"]
        yield from _machines(lineage.get("machines") or {})
    if fingerprint := body.get("fingerprint"):
        yield "Fingerprint of the inputs", [Code(fingerprint)]
    if run := body.get("mlflow_run_id"):
        yield "MLflow run", [Code(run)]
    trigger = body.get("triggered") or {}
    if run := body.get("dag_run_id"):
        yield "DAG run", [Link(run, trigger.get("url", ""))]
    if trigger:
        why = f": {trigger['reason']}" if trigger["reason"] else ""
        yield "Started", [f"{trigger['run_type']}, by {trigger['by']}{why}"]


def _machines(machines: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Sequence[Inline]]]:
    """Stages that ran on machines alike share a line."""
    alike: dict[str, list[str]] = {}
    for stage, machine in machines.items():
        alike.setdefault(", ".join(f"{name} {_value(value)}" for name, value in sorted(machine.items())), []).append(stage)
    for described, stages in alike.items():
        yield f"Machine of {', '.join(sorted(stages))}", [described]


def _revisions(found: Audit) -> Iterator[Block]:
    yield Heading(2, "Dataset revisions")
    name = found.prompt.name
    if not found.revisions:
        yield Text(["No entry refers to a dataset revision that is known."])
        return
    counted = "rows = kept + duplicates + quarantined, and forgotten where some were"
    yield Text([f"Those that the entries refer to. Of each landed object: {counted}. Rows of {name} alone."])
    for entry in found.revisions:
        objects = entry.body.get("objects", {}).get(name, {})
        yield Heading(3, f"Revision {entry.n}", f"revision-{entry.n}")
        rows = _value(entry.body.get("rows", {}).get(name))
        yield Facts([("Time", [entry.at]), ("Who", [entry.by]), ("Rows kept", [rows]), ("sha256", [Code(entry.sha256)])])
        if objects:
            # Most histories have no forgotten rows, and need no column for them.
            counts = ["rows", "kept", "duplicates", *(["forgotten"] if any(of.get("forgotten") for of in objects.values()) else [])]
            shown = [
                [
                    key,
                    *(_value(of.get(field, 0 if field == "forgotten" else None)) for field in counts),
                    *(_counts(of.get(f)) for f in COUNTED),
                ]
                for key, of in sorted(objects.items(), key=lambda item: item[1].get("sequence", 0))
            ]
            yield Table(["landed object", *counts, *COUNTED], shown)


def _ending(found: Audit) -> Iterator[Block]:
    yield Heading(2, "What this document cannot show")
    yield Bullets(
        [
            "That no entries were cut off at the end, and that the whole ledger was not written anew: only a head's hash that was kept "
            "elsewhere shows it, such as in an earlier signed copy. The entry of that number must still have that hash.",
            "That who and when are true: each is as whoever appended gave it.",
            "The outputs behind the figures, slices and curves: they stand in the MLflow runs that are named, and in the store. The full "
            "text of data.dvc and dvc.lock stands in each entry (retune ledger PROMPT --json), from which retune reproduce makes a "
            "release again.",
            "Whether the test rows are like what the prompt meets in use. Owner, description and intended use are those of today's "
            "prompt file.",
        ]
    )
    yield Heading(2, "Signed")
    for name, head in found.heads.items():
        yield Text(
            [
                f"This copy ends with entry {head.n} of the ledger {name}, sha256 ",
                Code(head.sha256),
                "." if not found.problems else ". IT DOES NOT VERIFY.",
            ]
        )
    yield Signature(["Name", "Date", "Signature"])


def _release(release: Mapping[str, Any] | None) -> list[Inline]:
    if release is None:
        return ["none"]
    version = f" (version {release['version']})" if release.get("version") else " (not registered)" if "version" in release else ""
    return [Code(release["release"]), version]


def _known(entries: Sequence[Entry], release: str) -> Mapping[str, Any]:
    """The latest record of a release that was a champion; its id alone where there is none."""
    records = (c for entry in reversed(entries) if (c := entry.body.get("champion")) and c["release"] == release)
    return next(records, {"release": release})


def _listed(values: Sequence[Sequence[Inline]]) -> list[Inline]:
    return [part for number, value in enumerate(values) for part in ([", ", *value] if number else value)] or ["none"]


def _revision(entry: Entry) -> int | None:
    lineage = entry.body.get("lineage") or {}
    revision: int | None = lineage.get("revision", entry.body.get("dataset_revision"))
    return revision


def _counts(counts: Mapping[str, int] | None) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted((counts or {}).items()) if count) or "none"


def _anything(value: Any) -> Block:
    """Records, in a list or by name, as a table with a line each; anything else as it is."""
    names = list(value) if isinstance(value, Mapping) else None
    records = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        return Text([Code(canonical_json(value).decode())])
    head = list(dict.fromkeys(field for record in records for field in record))
    rows = [[_value(record.get(field)) for field in head] for record in records]
    return Table(head, rows) if names is None else Table(["", *head], [[name, *row] for name, row in zip(names, rows, strict=True)])


def _value(value: Any) -> str:
    """None is a figure that was no number: JSON has none for it."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.6g}"
        case None | [] | {}:
            return "none"
        case str():
            return value
        case _:
            return canonical_json(value).decode()
