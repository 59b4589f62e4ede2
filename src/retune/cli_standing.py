"""Where every prompt and the dataset stand, read from the ledgers: the value of `retune status --json`."""

from typing import Any

from retune.config import load_prompts
from retune.ledger import Entry, Ledger, standing
from retune.settings import Settings
from retune.store import open_store

__all__ = ["brief", "standing_report"]


def standing_report(settings: Settings) -> dict[str, Any]:
    """Prompts by name, and the live dataset revision."""
    store = open_store(settings.store, settings.s3_endpoint)
    head = Ledger(store, "dataset").head()
    return {
        "prompts": {name: _prompt(Ledger(store, name).entries()) for name in load_prompts(settings.prompts)},
        "dataset": {"revision": head.n if head else None, "rows": dict(head.body["rows"]) if head else {}},
    }


def _prompt(entries: list[Entry]) -> dict[str, Any]:
    if not entries:
        return {"champion": None, "previous": None, "last": None, "barred": []}
    now, last = standing(entries), entries[-1]
    return {
        "champion": brief(now.champion, entries) if now.champion else None,
        "previous": brief(now.previous, entries) if now.previous else None,
        "last": {"verdict": last.kind, "at": last.at, "reason": last.reason, "entry": last.n},
        "barred": sorted(now.barred),
    }


def brief(champion: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """What a person asks of a champion; `since` is when it last became the champion."""
    since, before = "", None
    for entry in entries:
        release = (entry.body.get("champion") or {}).get("release", before)
        if release == champion["release"] and release != before:
            since = entry.at
        before = release
    return {"release": champion["release"], "version": champion["version"], "since": since, "metrics": dict(champion.get("metrics") or {})}
