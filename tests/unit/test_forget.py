"""`retune forget`: nothing of the rows stays, nothing else is lost, and nothing that was recorded differs without saying so."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from forgetting import ALSO_HERS, BAD, HERS, PROMPT, World, folder, kept, landed, parquet, put, release_id, rows, world

from retune.config import load_prompt
from retune.data.forgotten import Forgotten
from retune.errors import BadInputError, ConfigError, ConflictError
from retune.forget import append
from retune.forget_files import Selection, quarantine_part
from retune.ledger import Ledger
from retune.recorded import find, named
from retune.reproduce import reproduce
from retune.rewritten import Rewritten
from retune.store import Store
from retune.tasks.ingest import ingest

__all__ = ["kept", "landed"]


def test_her_rows_leave_every_revision_and_everything_made_of_them(kept: World) -> None:
    """Store and host cache hold them before, and nothing does after; every other row stays."""
    before = {n: kept.texts(n) for n in (0, 1)}
    for text in (HERS, ALSO_HERS, BAD, HERS.upper()):
        assert kept.holding(text) or text == HERS.upper(), "the test must look where they are"
    found = kept.forget(match={"customer": "hers"})
    for text in ("Rose Lane", "ROSE LANE"):
        assert kept.holding(text) == []
    assert found.ids == {"1:31", "2:21", "2:22"}, "with the row of another customer that has the same text"
    assert found.quarantined == {"1:32"}
    for n, texts in before.items():
        assert sorted(kept.texts(n)) == sorted(text for text in texts if "Rose" not in text)
    assert [entry.kind for entry in kept.revisions()] == ["revision", "revision", "forget"]
    assert kept.texts(2) == kept.texts(1)


def test_each_landed_row_stays_accounted_for(kept: World) -> None:
    kept.forget(match={"customer": "hers"})
    entry = kept.revisions()[-1]
    objects = entry.body["objects"]["p"]
    for record in objects.values():
        assert record["rows"] == record["kept"] + record["duplicates"] + sum(record["quarantined"].values()) + record["forgotten"]
    assert {key: (record["kept"], record["forgotten"]) for key, record in objects.items()} == {"a.csv": (35, 2), "b.csv": (20, 2)}
    assert entry.body["rows"] == {"p": 55}
    assert objects["a.csv"]["quarantine"] is None
    named = {file for record in objects.values() for file in record["files"]}
    assert named == set(kept.workspaces.files(kept.lineage(2), "data")), "the records name the files that are there"


def test_the_ledger_holds_no_text_and_its_chain_holds(kept: World) -> None:
    before = [entry.sha256 for entry in kept.revisions()]
    kept.forget(match={"customer": "hers"})
    assert [entry.sha256 for entry in kept.revisions()][:2] == before
    assert not any("Rose Lane" in json.dumps(entry.body) for entry in kept.revisions())


def test_an_object_that_changes_does_not_bring_them_back(kept: World) -> None:
    """The new version spells her text with a mail address that is redacted, the bad row stays bad, and one row is new."""
    kept.forget(match={"customer": "hers"})
    kept.land("a.csv", [*rows(0, 30), (HERS.replace(" ", " \t"), "low", "moved"), (BAD, "P1", "hers"), *rows(30, 5), *rows(90, 1)])
    assert ingest("p", "three", "test", log=lambda _: None) is not None
    assert not any("Rose" in text for text in kept.texts(3))
    record = kept.revisions()[-1].body["objects"]["p"]["a.csv"]
    assert (record["rows"], record["kept"], record["forgotten"], record["quarantined"]) == (38, 36, 2, {})
    assert kept.holding("Rose Lane") == []


def test_rows_are_named_by_id_or_by_their_texts(kept: World) -> None:
    assert kept.plan(ids=["2:22"]).ids == {"2:22"}
    assert kept.plan(texts=[(HERS,)]).ids == {"1:31", "2:21"}
    assert kept.plan(texts=[("nobody wrote this",)]).empty
    assert kept.plan(ids=["7:1"]).empty
    assert kept.plan(match={"customer": "hers", "label": "low"}).ids == {"2:22"}


def test_what_was_judged_then_reads_without_the_rows(kept: World) -> None:
    """The lineage of a release leads to splits and predictions of the same rows as each other, without hers."""
    before = find(kept.store, ["p"], release_id(b"tuned")).lineage
    old = {name: pd.read_parquet(io.BytesIO(kept.workspaces.read(before, f"artifacts/p/{name}"))) for name in TABLES}
    kept.forget(match={"customer": "hers"})
    recorded = named(kept.store, "p")
    ids = {"1:31", "2:21", "2:22"}
    for name in TABLES:
        now = pd.read_parquet(io.BytesIO(kept.workspaces.read(recorded.lineage, f"artifacts/p/{name}")))
        origin = old[name]["id"].str.split("~").str[0]
        expected = old[name][~origin.isin(ids)].reset_index(drop=True)
        pd.testing.assert_frame_equal(now, expected)
    assert sorted(kept.workspaces.files(recorded.lineage, "artifacts/p/dataset")) == [
        "inputs.json",
        *("test.parquet", "train.parquet", "validation.parquet"),
    ]
    assert recorded.rewritten == ("dataset revision 1 was rewritten by forget at revision 2: 3 rows and 1 quarantined of p less",)
    assert kept.store.list("sections/p/preprocess/") == []
    assert kept.store.list("checkpoints/") == []


TABLES = ("dataset/train.parquet", "dataset/validation.parquet", "dataset/test.parquet", "predictions.parquet", "probes.parquet")


def test_a_release_that_holds_the_rows_goes_and_one_tuned_on_them_stays_until_asked(kept: World) -> None:
    alone, tuned, few = release_id(b"alone"), release_id(b"tuned"), release_id(b"few")
    found = kept.forget(match={"customer": "hers"})
    assert found.releases_holding == {few: "deleted"}
    assert found.releases_tuned == {tuned: "champion"}, "the template alone has seen no row"
    with pytest.raises(BadInputError, match="was deleted by forget at dataset revision 2"):
        find(kept.store, ["p"], few)
    assert kept.workspaces.files(find(kept.store, ["p"], tuned).lineage, "artifacts/p/release").keys() >= {"manifest.json"}
    ledger = Ledger(kept.store, "p")
    entries = ledger.entries()
    ledger.append("rollback", "t", "back", {"champion": entries[0].body["champion"]}, entries[-1])
    assert kept.plan().empty, "a soft prompt is no row"
    assert kept.forget(releases=True).releases_tuned == {tuned: "deleted"}
    with pytest.raises(BadInputError, match="deleted by forget at dataset revision 3"):
        find(kept.store, ["p"], tuned)
    assert kept.holding("a soft prompt") == []
    assert find(kept.store, ["p"], alone).release == alone
    assert kept.workspaces.files(find(kept.store, ["p"], alone).lineage, "artifacts/p/release").keys() == {"manifest.json", "prompt.yaml"}


def test_a_few_shot_champion_keeps_its_rows_until_it_is_replaced(kept: World) -> None:
    ledger = Ledger(kept.store, "p")
    entries = ledger.entries()
    record = entries[2].body["candidate"]
    ledger.append("promote", "t", "better", {"champion": record, "candidate": record}, entries[-1])
    few = release_id(b"few")
    assert kept.forget(match={"customer": "hers"}).releases_holding == {few: "champion"}
    assert len(kept.holding("Rose Lane")) == 1, "its examples, in the store alone"
    entries = ledger.entries()
    ledger.append("rollback", "t", "back", {"champion": entries[0].body["champion"]}, entries[-1])
    assert kept.forget().releases_holding == {few: "deleted"}
    assert kept.holding("Rose Lane") == []


class KilledError(Exception):
    pass


class Dying:
    """Counts the writes of a store, and stands for a process that is killed before the one after `left`."""

    def __init__(self, store: Store, left: int, patch: pytest.MonkeyPatch) -> None:
        self.left = left
        for name in ("put", "create", "delete"):
            patch.setattr(store, name, partial(self.write, getattr(store, name)))

    def write(self, real: Callable[..., None], *arguments: Any) -> None:
        if self.left == 0:
            raise KilledError
        self.left -= 1
        real(*arguments)


WRITES = 1000
"""More than a call makes."""


@pytest.fixture(scope="module")
def writes(landed: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many writes an undisturbed call makes."""
    project = tmp_path_factory.mktemp("counted") / "project"
    shutil.copytree(landed, project)
    counted = world(project)
    with pytest.MonkeyPatch.context() as patch:
        dying = Dying(counted.store, WRITES, patch)
        counted.forget(match={"customer": "hers"})
    return WRITES - dying.left


@pytest.mark.parametrize("share", [0, 0.2, 0.4, 0.6, 0.8, 1])
def test_a_call_that_is_killed_anywhere_is_finished_by_the_next(kept: World, writes: int, share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Dying(kept.store, round(share * (writes - 1)), patch)
        with pytest.raises(KilledError):
            kept.forget(match={"customer": "hers"})
    again = world(kept.project)
    found = again.plan(match={"customer": "hers"})
    if not found.empty:
        append(again.workspaces, found, "anna", "request 17")
    assert again.sweep()
    assert again.holding("Rose Lane") == []
    assert [entry.kind for entry in again.revisions()] == ["revision", "revision", "forget"]
    assert again.revisions()[-1].body["rows"] == {"p": 55}
    assert not again.sweep(), "a third call has nothing to do"


def test_an_ingest_in_between_is_looked_through_as_well(kept: World) -> None:
    found = kept.plan(match={"customer": "hers"})
    kept.land("c.csv", [*rows(200, 3), (HERS, "low", "c7")])
    assert ingest("p", "three", "test", log=lambda _: None) is not None
    with pytest.raises(ConflictError):
        append(kept.workspaces, found, "anna", "request 17")
    assert kept.forget(match={"customer": "hers"}).ids == {"1:31", "2:21", "2:22", "3:4"}
    assert kept.holding("Rose Lane") == []


def test_a_second_forget_builds_on_the_first(kept: World) -> None:
    kept.forget(match={"customer": "hers"})
    kept.forget(match={"customer": "c3"})
    assert not any("number 3 of" in text for n in (0, 1, 2, 3) for text in kept.texts(n))
    assert len(kept.texts(0)) == 34
    told = Rewritten.of(kept.store).told(0)
    assert [sentence.partition(": ")[2] for sentence in told] == ["1 row and 1 quarantined of p less", "1 row of p less"]


def test_a_release_whose_rows_are_gone_is_not_made_again(kept: World) -> None:
    kept.forget(match={"customer": "hers"})
    with pytest.raises(BadInputError, match="dataset revision 1 was rewritten by forget at revision 2: 3 rows and 1 quarantined of p less"):
        reproduce(kept.workspaces.settings, named(kept.store, "p"))


def test_what_the_section_index_alone_names_is_deleted_so_that_a_second_forget_finds_it_all(kept: World) -> None:
    """Of a run that was never judged: nothing would name the tables that took the place of its tables."""
    test = pd.DataFrame({"id": ["1:31", "1:3"], "text": [HERS, rows(3, 1)[0][0]], "label": ["high", "low"]})
    for number, (path, md5) in enumerate([("predictions.parquet", put(kept, parquet(test))), ("dataset", dataset_of(kept, test))]):
        section = {"cmd": "x", "outs": [{"path": f"artifacts/p/{path}", "hash": "md5", "md5": md5}]}
        kept.store.put(f"sections/p/evaluate/{number + 7:064x}.json", json.dumps({"section": section, "machine": {}}).encode())
    kept.forget(match={"customer": "hers"})
    assert kept.holding("Rose Lane") == []
    kept.forget(match={"customer": "c3"})
    assert kept.holding("number 3 of") == []


def dataset_of(kept: World, test: pd.DataFrame) -> str:
    return folder(kept, {"test.parquet": parquet(test), "report.json": b'{"near_duplicate_rows": []}'})


def test_a_value_of_which_a_placeholder_is_kept_names_nobody(kept: World) -> None:
    """It would be everybody's: the placeholder is the same for all."""
    for value in ("jane@x.org", "+49 30 1234567", "4111 1111 1111 1111", "<mail>", " <phone>"):
        with pytest.raises(ConfigError, match="--rows-file"):
            kept.plan(match={"text": value})


def test_a_malformed_record_is_named_by_the_whole_of_it() -> None:
    records = ["4711,hers", "47110,of another"]
    frame = pd.DataFrame(
        {"object": [1, 1], "row": [1, 2], "kind": "malformed", "reason": "", "record": [json.dumps({"raw": r}) for r in records]}
    )

    def gone(match: dict[str, str], ids: frozenset[str] = frozenset()) -> list[str]:
        part = quarantine_part(parquet(frame), Selection(match, ids), [])
        return part.ids if part else []

    assert gone({"customer": "4711"}) == []
    assert gone({"text": "4711,hers"}) == ["1:1"]
    assert gone({}, frozenset({"1:2"})) == ["1:2"]


@pytest.fixture
def two(kept: World) -> tuple[World, World]:
    """Another prompt on the same source: its parts are the same bytes. A table of its stages is, too."""
    (kept.project / "prompts/q.yaml").write_text(yaml.safe_dump({**PROMPT, "name": "q"}))
    assert ingest("q", "three", "test", log=lambda _: None) is not None
    other = replace(kept, prompt=load_prompt(kept.project / "prompts/q.yaml"))
    files = kept.workspaces.files(kept.lineage(2), "data")
    assert {md5 for path, md5 in files.items() if path.startswith("p/")} == {md5 for path, md5 in files.items() if path.startswith("q/")}
    (key,) = [key for key in kept.store.list("sections/p/preprocess/") if key.endswith("1.json")]
    kept.store.put(key.replace("/p/", "/q/"), kept.store.get(key).replace(b"artifacts/p", b"artifacts/q"))
    return kept, other


def test_another_prompt_on_the_source_keeps_what_it_has_until_it_forgets_too(two: tuple[World, World]) -> None:
    mine, other = two

    def of_q() -> list[str]:
        objects, found = other.workspaces.objects, []
        for key in other.store.list("sections/q/"):
            found += [out["md5"] for out in json.loads(other.store.get(key))["section"]["outs"]]
        found += [item["md5"] for md5 in found for item in json.loads(objects.get(md5))]
        return [*found, *other.workspaces.files(other.lineage(2), "data/q").values()]

    before = of_q()
    found = mine.forget(match={"customer": "hers"})
    assert found.also_in == ["q"]
    assert found.revisions[2] == {"kept": 3, "quarantined": 1}
    assert of_q() == before
    assert mine.workspaces.objects.missing(before) == []
    files = mine.workspaces.files(mine.lineage(3), "data")
    named = {file for prompt in ("p", "q") for record in mine.revisions()[3].body["objects"][prompt].values() for file in record["files"]}
    assert named == set(files)
    assert mine.plan(match={"customer": "hers"}).empty
    found = other.forget(match={"customer": "hers"})
    assert found.also_in == []
    assert mine.holding("Rose Lane") == []
    assert mine.revisions()[-1].body["rows"] == {"p": 55, "q": 55}
    other.land("a.csv", [*rows(0, 30), (HERS, "high", "hers"), *rows(30, 6)])
    assert ingest("q", "four", "test", log=lambda _: None) is not None
    assert mine.holding("Rose Lane") == []


def test_a_release_of_another_prompt_or_of_kept_rows_alone_can_be_made_again(kept: World) -> None:
    """Rows of another prompt, or quarantined ones, are no part of what it follows from."""
    kept.forget(ids=["1:32"])
    rewritten = Rewritten.of(kept.store)
    assert named(kept.store, "p").rewritten == ()
    assert rewritten.told(1) == ["dataset revision 1 was rewritten by forget at revision 2: 0 rows and 1 quarantined of p less"]
    kept.forget(match={"customer": "hers"})
    assert Rewritten.of(kept.store).told(1, "q") == []
    assert len(named(kept.store, "p").rewritten) == 1


def test_trials_that_were_never_judged_go_with_the_releases_that_were(kept: World) -> None:
    key = kept.store.list("sections/p/preprocess/")[0]
    (dataset,) = json.loads(kept.store.get(key))["section"]["outs"]
    trial = folder(
        kept, {"manifest.json": b"trial", "adapter/adapter_model.safetensors": b"another soft prompt", "prompt.yaml": b"name: p"}
    )
    section = {"deps": [dataset], "outs": [{"path": "artifacts/p/release", "hash": "md5", "md5": trial}]}
    kept.store.put(f"sections/p/tune/{9:064x}.json", json.dumps({"section": section, "machine": {}}).encode())
    kept.forget(match={"customer": "hers"})
    assert kept.holding("another soft prompt"), "not asked for"
    found = kept.forget(releases=True)
    assert found.releases_tuned[release_id(b"trial")] == "deleted"
    assert kept.holding("another soft prompt") == []
    assert kept.workspaces.files(find(kept.store, ["p"], release_id(b"alone")).lineage, "artifacts/p/release").keys() == {
        "manifest.json",
        "prompt.yaml",
    }


def test_rows_of_a_part_that_is_older_than_an_input_field_stay_away(kept: World) -> None:
    """The prompt gets a field that the landed files begin to have."""
    asks = {**PROMPT, "template": "T: {text} {channel}\nA:"}
    (kept.project / "prompts/p.yaml").write_text(yaml.safe_dump(asks))
    again = world(kept.project)
    found = again.forget(match={"customer": "hers"})
    assert found.ids == {"1:31", "2:21", "2:22"}
    place = kept.project / "landing/p/a.csv"
    place.write_text(f'text,label,customer,channel\n"{HERS}",high,hers,app\n"a new row of somebody else",low,c7,app\n')
    assert ingest("p", "three", "test", log=lambda _: None) is not None
    assert again.revisions()[-1].body["objects"]["p"]["a.csv"]["forgotten"] == 1
    assert again.holding("Rose Lane") == []


def test_redaction_white_space_and_entities_make_no_other_digest() -> None:
    rows_ = Forgotten.new(["text"]).with_texts([("Write to <mail> &amp; me",)])
    frame = pd.DataFrame({"text": ["Write to <mail> & me", "Write  to\n<mail> &amp; me ", "Write to me", None]})
    assert rows_.among(frame).tolist() == [True, True, False, False]
    assert rows_.among(frame.rename(columns={"text": "body"})).tolist() == [False] * 4
    assert Forgotten.from_json(json.loads(json.dumps(rows_.to_json()))) == rows_
    assert Forgotten.new(["text"]).key != rows_.key


def test_a_prompt_that_has_lost_the_field_they_are_known_by_takes_nothing_in() -> None:
    with pytest.raises(ConfigError, match="has no body"):
        Forgotten.new(["text", "body"]).check(["text", "label"])
