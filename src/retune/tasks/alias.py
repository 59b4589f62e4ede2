"""MLflow's alias `champion` against the ledger: what a person moved by hand is checked and entered, never silently reverted."""

from retune.errors import IntegrityError
from retune.ledger import Entry
from retune.registry import CHAMPION, RELEASE
from retune.tasks.context import Context, champion_of
from retune.tasks.release import record_of, smoke_test

__all__ = ["follow_alias"]


def follow_alias(context: Context, entries: list[Entry]) -> list[Entry]:
    """The ledger's entries, with one more if the alias was moved in MLflow.

    An alias that Retune itself did not get to move, since a task was killed between ledger and alias, is moved now.
    Raises IntegrityError, saying what to do, if the version it was moved to does not verify. Retry: appends nothing twice.
    """
    registry, champion = context.registry, champion_of(entries)
    alias = registry.alias(CHAMPION)
    if alias is not None and str(alias.version) == champion["version"]:
        return entries
    if alias is None or registry.projected() != champion["version"]:
        print(f"alias {CHAMPION} did not follow the ledger: pointing it at version {champion['version']}")
        registry.project(champion["version"], None)
        return entries
    release = alias.tags.get(RELEASE)
    moved = f"somebody moved alias {CHAMPION} of {context.prompt.name} in MLflow from version {champion['version']} to {alias.version}"
    try:
        if release is None:
            raise IntegrityError(f"version {alias.version} has no tag {RELEASE}: Retune did not register it")
        record = record_of(context, entries, release, str(alias.version))
        smoke_test(context, entries, release, f"/{alias.version}")
    except IntegrityError as error:
        raise IntegrityError(
            f"{moved}, which does not verify: {error}. Point the alias at version {champion['version']} again in MLflow, "
            f"or at another version that Retune registered, then run again"
        ) from error
    print(f"{moved}; it verifies and answers: it is the champion from here on")
    body = {"champion": record, "from": champion["release"], "to": release}
    entry = context.ledger.append(
        "move", "MLflow", f"moved in MLflow from version {champion['version']} to {alias.version}", body, entries[-1]
    )
    registry.project(str(alias.version), champion["version"])
    return [*entries, entry]
