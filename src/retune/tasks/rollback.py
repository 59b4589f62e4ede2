"""Rollback, its bar, and the lifting of the bar. Nothing is trained: an earlier release becomes the champion again."""

from collections.abc import Callable, Mapping
from datetime import datetime

from retune.config import load_prompt
from retune.errors import BadInputError, ConflictError
from retune.ledger import Entry, standing
from retune.records import Trigger
from retune.rewritten import Rewritten
from retune.settings import Settings
from retune.tasks.context import Context, Json, champion_of

__all__ = ["choices", "choices_markdown", "chosen", "rollback", "unbar"]

FALLBACK = "previous"
"""Stands for the latest former champion that is not barred."""
ATTEMPTS = 5
"""How often a lost race for the ledger's head is run again, as long as the champion stays the same."""


def choices(name: str) -> dict[str, Json]:
    """What a rollback of a prompt can go to, the one it goes to by itself first: short text for a button -> the ledger's record of it.

    Raises BadInputError if there is nothing to go back to.
    """
    context = _load(name)
    entries = context.ledger.entries()
    now = standing(entries)
    former = {c["release"]: {**c, "at": e.at} for e in entries if (c := e.body.get("champion"))}
    gone = {*now.barred, *Rewritten.of(context.workspaces.store).deleted()}
    if now.champion is None or now.fallback is None or not former.keys() - gone - {now.champion["release"]}:
        raise BadInputError(f"{name} has no earlier release to go back to; see `retune releases {name}`")
    current, first = now.champion["release"], now.fallback["release"]
    listed = sorted(former.keys() - gone - {current}, key=lambda r: (r == first, former[r]["at"]), reverse=True)
    return {f"version {former[r]['version']} · {r[:12]}": former[r] for r in listed}


def choices_markdown(found: Mapping[str, Json]) -> str:
    """The choices as a table: metrics at their promotion, and when the ledger last named each."""
    rows = []
    for choice, record in found.items():
        figures = ", ".join(f"{metric} {value:.3f}" for metric, value in (record.get("metrics") or {}).items())
        last = f"{datetime.fromisoformat(record['at']):%Y-%m-%d %H:%M}"
        rows.append(f"| {choice} | {figures or 'the template alone'} | {last} |")
    return "\n".join(["| release | on its own test rows | last champion in the ledger, UTC |", "| --- | --- | --- |", *rows])


def chosen(name: str, choice: str) -> str:
    """Release id of a choice as `choices` showed it. Raises BadInputError if it is none any more."""
    found = choices(name)
    if choice not in found:
        raise BadInputError(f"{choice!r} is not a release that {name} can go back to any more; choose among {', '.join(found)}")
    return str(found[choice]["release"])


def rollback(name: str, target: str | None, trigger: Json, answer: Json | None = None, log: Callable[[str], None] = print) -> Json:
    """Makes an earlier release the champion and bars the one it leaves.

    `target`: `previous` or None, a version number, or the beginning of a release id. `answer`: who chose it, where somebody was asked.
    The release is loaded and tried first; ledger, then aliases. Raises BadInputError for a wrong target, IntegrityError if the release
    does not load or answer as it did, ConflictError if the champion changed meanwhile. Retry: rolls back once.
    """
    started_by = Trigger.from_json(trigger)
    context = _load(name)
    entries = context.ledger.entries()
    entry = next((e for e in entries if e.kind == "rollback" and e.body.get("dag_run_id") == started_by.dag_run_id), None)
    if entry is None:
        entry = _roll_back(context, entries, target, started_by, answer)
        entries = [*entries, entry]
    left = entry.body["left"]
    if champion_of(entries)["release"] == entry.body["to"]:
        context.registry.project(entry.body["champion"]["version"], left["version"])
        context.registry.bar(left["version"], f"rolled back by {entry.by}: {entry.reason}")
        context.registry.bar(entry.body["champion"]["version"], None)
    log(
        f"{name}: version {entry.body['champion']['version']} (release {entry.body['to'][:12]}) is the champion; version {left['version']} "
        f"(release {left['release'][:12]}) is barred until `retune unbar {name} {left['release'][:12]}`"
    )
    return {
        "entry": entry.n,
        "from": entry.body["from"],
        "to": entry.body["to"],
        "version": entry.body["champion"]["version"],
        "barred": left["release"],
        "links": {"Release": context.release_link(entry.body["champion"]["version"])},
    }


def _roll_back(context: Context, entries: list[Entry], target: str | None, trigger: Trigger, answer: Json | None) -> Entry:
    from retune.tasks.release import smoke_test

    now = standing(entries)
    if now.champion is None:
        raise BadInputError(f"{context.prompt.name} has no champion yet, so nothing to roll back; see `retune status`")
    to = _former(context.prompt.name, entries, target)
    smoke_test(context, entries, to["release"], f"/{to['version']}")
    body = {
        "champion": to,
        "from": now.champion["release"],
        "to": to["release"],
        "left": {"release": now.champion["release"], "version": now.champion["version"]},
        "dag_run_id": trigger.dag_run_id,
        "triggered": trigger.to_json(),
        **({"answer": answer} if answer else {}),
    }
    reason = "; ".join(filter(None, [trigger.reason, (answer or {}).get("comment")]))
    by = (answer or {}).get("by") or trigger.by
    for _ in range(ATTEMPTS):
        try:
            return context.ledger.append("rollback", by, reason or "no reason given", body, entries[-1])
        except ConflictError:
            entries = context.ledger.entries()
            if champion_of(entries)["release"] != now.champion["release"]:
                break
    raise ConflictError(
        f"the champion of {context.prompt.name} changed while this rollback was prepared; see `retune ledger {context.prompt.name}`, "
        "then roll back again if it is still wanted"
    )


def _former(name: str, entries: list[Entry], target: str | None) -> Json:
    """The former champion that a target names."""
    now = standing(entries)
    if not target or target == FALLBACK:
        if now.fallback is None:
            raise BadInputError(f"{name} has no earlier release to go back to; see `retune releases {name}`")
        return now.fallback
    former = {c["release"]: c for e in entries if (c := e.body.get("champion"))}
    found = [c for r, c in former.items() if str(c["version"]) == target or (len(target) >= 6 and r.startswith(target))]
    known = ", ".join(f"{c['version']} ({r[:12]})" for r, c in former.items() if now.champion and r != now.champion["release"])
    if len(found) != 1:
        raise BadInputError(
            f"release must be {FALLBACK}, a version or the beginning (6 digits or more) of the id of a former champion of {name}, "
            f"got {target!r}; known: {known or 'none'}"
        )
    release = found[0]["release"]
    if now.champion and release == now.champion["release"]:
        raise BadInputError(f"{target} is the champion of {name} already; go back to one of {known or 'none'}")
    if release in now.barred:
        raise BadInputError(
            f"{target} of {name} is barred: an earlier rollback left it. Lift that first: retune unbar {name} {release[:12]}"
        )
    return dict(found[0])


def unbar(name: str, release: str, by: str, reason: str) -> Json:
    """Lets a barred release be promoted again. `release`: the beginning of its id, or its version.

    Raises BadInputError if no barred release, or more than one, is meant. Retry: a release that is not barred any more is an error.
    """
    context = _load(name)
    entries = context.ledger.entries()
    barred = {r: str(c["version"]) for e in entries if (c := e.body.get("champion")) and (r := c["release"]) in standing(entries).barred}
    found = [r for r, version in barred.items() if version == release or (len(release) >= 6 and r.startswith(release))]
    if len(found) != 1:
        listed = ", ".join(f"{version} ({r[:12]})" for r, version in barred.items()) or "none"
        raise BadInputError(f"release must be a barred one of {name}, got {release!r}; barred: {listed}")
    entry = context.ledger.append("unbar", by, reason, {"release": found[0], "champion": champion_of(entries)}, entries[-1])
    context.registry.bar(barred[found[0]], None)
    return {"entry": entry.n, "release": found[0], "version": barred[found[0]]}


def _load(name: str) -> Context:
    context = Context.load(load_prompt(Settings.load().prompts / f"{name}.yaml"))
    if context.ledger.head() is None:
        raise BadInputError(f"{name} has no ledger yet: nothing was released; land data, then `retune run {name} --ingest`")
    return context
