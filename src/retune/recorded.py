"""Releases as the ledgers recorded them, each with the lineage that makes it again."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from retune.errors import BadInputError, IntegrityError
from retune.ledger import Entry, Ledger, standing
from retune.records import Lineage
from retune.rewritten import Rewritten
from retune.store import Store

__all__ = ["Recorded", "as_it_reads_now", "by_release", "champion", "find", "named"]

PREVIOUS = "previous"
"""Names the champion before."""


@dataclass(frozen=True)
class Recorded:
    """A release, the latest ledger entry that carries its lineage, and that lineage."""

    prompt: str
    release: str
    entry: int
    lineage: Lineage
    """As it reads now: with what took the place of objects that `retune forget` rewrote."""
    rewritten: tuple[str, ...] = ()
    """What was forgotten of the rows that it follows from, a sentence each."""


def champion(store: Store, prompt: str) -> Recorded | None:
    """The prompt's champion; None for an empty ledger. Raises IntegrityError if no entry carries its lineage."""
    entries = Ledger(store, prompt).entries()
    now = standing(entries).champion
    if now is None:
        return None
    found = by_release(prompt, entries)
    if now["release"] not in found:
        raise IntegrityError(f"no entry of the ledger {prompt} carries the lineage of its champion {now['release']}")
    return as_it_reads_now(store, found[now["release"]])


def as_it_reads_now(store: Store, recorded: Recorded) -> Recorded:
    """The release with its lineage as `retune forget` left it. Raises BadInputError for a release that it deleted."""
    rewritten = Rewritten.of(store)
    if (n := rewritten.deleted().get(recorded.release)) is not None:
        raise BadInputError(
            f"release {recorded.release[:12]} of {recorded.prompt} was deleted by forget at dataset revision {n}; "
            f"name another, see `retune releases {recorded.prompt}`"
        )
    lineage = rewritten.current(recorded.lineage)
    return replace(recorded, lineage=lineage, rewritten=tuple(rewritten.told(recorded.lineage.revision, recorded.prompt)))


def find(store: Store, prompts: Iterable[str], beginning: str) -> Recorded:
    """The one release of these prompts whose id begins so. Raises BadInputError if there is none, or more than one."""
    named = list(prompts)
    found = {
        release: recorded
        for prompt in named
        for release, recorded in by_release(prompt, Ledger(store, prompt).entries()).items()
        if release.startswith(beginning)
    }
    if len(found) != 1:
        listed = f": {', '.join(sorted(r[:12] for r in found))}" if found else ""
        raise BadInputError(f"{beginning!r} begins {len(found)} releases of {', '.join(named)}{listed}; see `retune releases PROMPT`")
    return as_it_reads_now(store, found.popitem()[1])


def named(store: Store, prompt: str, release: str | None = None) -> Recorded:
    """The prompt's release that is called `previous`, has this version, or whose id begins so; None: its champion.

    Raises BadInputError if there is none, or more than one.
    """
    if release is None:
        found = champion(store, prompt)
        if found is None:
            raise BadInputError(f"the ledger of {prompt} is empty: nothing was released yet; see `retune status`")
        return found
    entries = Ledger(store, prompt).entries()
    if release == PREVIOUS:
        previous = standing(entries).previous
        if previous is None:
            raise BadInputError(f"{prompt} has had one champion only, or none; see `retune releases {prompt}`")
        return find(store, [prompt], previous["release"])
    parts = [part for entry in entries for part in (entry.body.get("champion"), entry.body.get("candidate")) if part]
    version = next((str(part["release"]) for part in parts if part.get("version") and str(part["version"]) == release), None)
    return find(store, [prompt], version or release)


def by_release(prompt: str, entries: list[Entry]) -> dict[str, Recorded]:
    """Release id -> the release. A verdict's lineage is its candidate's; that of entry 0 belongs to the template alone."""
    found = {}
    for entry in entries:
        judged = entry.body.get("candidate") or entry.body.get("champion")
        if judged and "lineage" in entry.body:
            found[judged["release"]] = Recorded(prompt, judged["release"], entry.n, Lineage.from_json(entry.body["lineage"]))
    return found
