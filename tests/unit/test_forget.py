"""`retune forget` on a folder store: real ingest and DVC objects, splits and predictions as the stages write them."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from retune.config import Prompt, load_prompt
from retune.data.forgotten import Forgotten
from retune.data.preprocess import preprocess
from retune.dvc_files import lock_text, md5_of
from retune.errors import BadInputError, ConfigError, ConflictError
from retune.forget import Plan, append, plan, sweep
from retune.forget_files import Selection
from retune.ledger import Entry, Ledger
from retune.recorded import find, named
from retune.records import Lineage
from retune.reproduce import reproduce
from retune.rewritten import Rewritten
from retune.settings import Settings
from retune.store import Store
from retune.tasks.ingest import ingest
from retune.workspace import Workspaces

HERS = "My flat at Rose Lane is under water and the heating has failed"
ALSO_HERS = "Nobody at Rose Lane has answered my three letters about the lift"
BAD = "A row about Rose Lane whose label is none of ours"
PROMPT = {
    "name": "p",
    "task": "classification",
    "base_model": {"path": "model", "sha256": "0" * 64},
    "source": {"path": "landing/p"},
    "template": "T: {text}\nA:",
    "target": "label",
    "labels": {"low": " low", "high": " high"},
    "slices": {"customer": None},
    "preprocess": {"splits": {"train": 0.5, "validation": 0.2, "test": 0.3}},
}
TOPICS = ("printer", "router", "invoice", "contract", "keyboard", "screen", "badge", "door", "phone line", "coffee machine")


def rows(start: int, count: int) -> list[tuple[str, str, str]]:
    return [
        (f"The {TOPICS[n % 10]} number {n} of floor {n * 7 % 31} is broken in way {n * 13 % 101}", ("low", "high")[n % 2], f"c{n}")
        for n in range(start, start + count)
    ]


def csv(found: list[tuple[str, str, str]]) -> str:
    return "text,label,customer\n" + "".join(f'"{text}",{label},{customer}\n' for text, label, customer in found)


@dataclass
class World:
    """A project with two dataset revisions and what was made of the second."""

    project: Path
    workspaces: Workspaces
    prompt: Prompt

    @property
    def store(self) -> Store:
        return self.workspaces.store

    def land(self, name: str, found: list[tuple[str, str, str]]) -> None:
        place = self.project / "landing/p" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(csv(found), "utf-8")

    def revisions(self) -> list[Entry]:
        return Ledger(self.store, "dataset").entries()

    def lineage(self, n: int) -> Lineage:
        return Rewritten.of(self.store).current(self.workspaces.lineage(self.revisions()[n].body["data"], n))

    def texts(self, n: int) -> list[str]:
        """Texts of the kept rows of a revision, as it reads now."""
        files = self.workspaces.files(self.lineage(n), "data/p").values()
        return [text for md5 in files for text in pd.read_parquet(io.BytesIO(self.workspaces.objects.get(md5)))["text"]]

    def plan(self, **named: Any) -> Plan:
        selection = Selection(named.pop("match", {}), frozenset(named.pop("ids", ())))
        return plan(self.workspaces, self.prompt, selection, **named)

    def forget(self, **named: Any) -> Plan:
        found = self.plan(**named)
        append(self.workspaces, found, "anna", "request 17")
        self.sweep()
        return found

    def sweep(self) -> Any:
        return sweep(self.store, self.workspaces.settings, Rewritten.of(self.store))

    def holding(self, text: str) -> list[str]:
        """Every file of store and cache that holds a text, in whatever column or line."""
        return [str(path) for path in sorted(self.project.glob(".retune/**/*")) if path.is_file() and text in shown(path.read_bytes())]


def shown(content: bytes) -> str:
    if not content.startswith(b"PAR1"):
        return content.decode(errors="replace")
    return "\n".join(str(value) for column in pq.read_table(io.BytesIO(content)).to_pydict().values() for value in column)


def world(project: Path) -> World:
    settings = Settings.load({"RETUNE_PROJECT": str(project)})
    return World(project, Workspaces(settings, lambda _: None), load_prompt(project / "prompts/p.yaml"))


@pytest.fixture(scope="module")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two landed objects in two revisions. Hers stands in both, one of the copies spelt with more white space."""
    project = tmp_path_factory.mktemp("landed")
    (project / "dvc.yaml").write_text("stages: {}\n")
    (project / ".dvcignore").write_text("__pycache__\n")
    (project / "requirements.lock").write_text("")
    (project / "prompts").mkdir()
    (project / "prompts/p.yaml").write_text(yaml.safe_dump(PROMPT))
    made = world(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETUNE_PROJECT", str(project))
        for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_CACHE", "RETUNE_PROMPTS"):
            patch.delenv(name, raising=False)
        made.land("a.csv", [*rows(0, 30), (HERS, "high", "hers"), (BAD, "P1", "hers"), *rows(30, 5)])
        assert ingest("p", "one", "test", log=lambda _: None) is not None
        made.land("b.csv", [*rows(40, 20), (HERS.replace(" ", "  "), "low", "c99"), (ALSO_HERS, "low", "hers")])
        assert ingest("p", "two", "test", log=lambda _: None) is not None
    derive(made)
    return project


def derive(made: World) -> None:
    """Section index and ledger as stages and tasks leave them: a template alone, a tuned champion, a few-shot release that was held."""
    objects, data = made.workspaces.objects, made.lineage(1)
    files = made.workspaces.files(data, "data/p").values()
    parts = pd.concat([pd.read_parquet(io.BytesIO(objects.get(md5))) for md5 in files], ignore_index=True)
    result = preprocess(parts, made.prompt)
    splits = {"train": result.train, "validation": result.validation, "test": result.test}
    near = [{"id": "9:9", "split": "test", "near_id": row_id(result, HERS), "near_split": "train", "text": "like hers", "near_text": HERS}]
    contents = {f"{name}.parquet": parquet(frame) for name, frame in splits.items()}
    contents |= {"report.json": json.dumps({**result.report, "near_duplicate_rows": near}).encode(), "profile.html": HERS.encode()}
    dataset = folder(made, contents | {"inputs.json": b"{}"})
    predictions = put(made, parquet(result.test[["id"]].assign(prediction="low")))
    probes = result.test.assign(of=result.test["id"], id=result.test["id"] + "~case0", text=result.test["text"].str.upper())
    probed = put(made, parquet(probes))
    examples = "".join(
        json.dumps({"id": i, "text": t, "label": "low"}) + "\n" for i, t in zip(parts_ids(parts), parts["text"], strict=True)
    )
    tuned = {"manifest.json": b"tuned", "adapter/adapter_model.safetensors": b"a soft prompt", "prompt.yaml": b"name: p"}
    releases = {
        "0": folder(made, {"manifest.json": b"alone", "prompt.yaml": b"name: p"}),
        "1": folder(made, tuned),
        "2": folder(made, {"manifest.json": b"few", "examples/rows.jsonl": examples.encode(), "prompt.yaml": b"name: p"}),
    }
    ledger, head = Ledger(made.store, "p"), None
    for number, (kind, manifest) in enumerate([("found", b"alone"), ("promote", b"tuned"), ("hold", b"few")]):
        sections = {
            "preprocess@p": {"cmd": "x", "outs": [{"path": "artifacts/p/dataset", "hash": "md5", "md5": dataset}]},
            "tune@p": {"cmd": "x", "outs": [{"path": "artifacts/p/release", "hash": "md5", "md5": releases[str(number)]}]},
            "evaluate@p": {
                "cmd": "x",
                "outs": [
                    {"path": "artifacts/p/predictions.parquet", "hash": "md5", "md5": predictions},
                    {"path": "artifacts/p/probes.parquet", "hash": "md5", "md5": probed},
                ],
            },
        }
        for name, section in sections.items():
            made.store.put(
                f"sections/p/{name.partition('@')[0]}/{number:064x}.json", json.dumps({"section": section, "machine": {}}).encode()
            )
        lineage = replace(data, lock=lock_text(sections)).to_json()
        record = {"release": release_id(manifest), "version": str(number + 1), "outs": sections["tune@p"]["outs"]}
        champion = record if kind != "hold" else head.body["champion"]  # type: ignore[attr-defined]
        head = ledger.append(kind, "t", kind, {"champion": champion, "candidate": record, "lineage": lineage}, head)
    made.store.put(f"checkpoints/p/{'c' * 64}", b"state")


def release_id(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()


def parquet(frame: pd.DataFrame) -> bytes:
    target = io.BytesIO()
    frame.to_parquet(target, index=False)
    return target.getvalue()


def put(made: World, content: bytes) -> str:
    made.workspaces.objects.put(content)
    return md5_of(content)


def folder(made: World, contents: dict[str, bytes]) -> str:
    return made.workspaces.objects.put_listing({name: put(made, content) for name, content in contents.items()})


def parts_ids(parts: pd.DataFrame) -> list[str]:
    return [f"{o}:{r}" for o, r in zip(parts["object"], parts["row"], strict=True)]


def row_id(result: Any, text: str) -> str:
    frames = pd.concat([result.train, result.validation, result.test])
    return str(frames.loc[frames["text"] == text, "id"].iloc[0])


@pytest.fixture
def kept(landed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of it for one test."""
    project = tmp_path / "project"
    shutil.copytree(landed, project)
    monkeypatch.setenv("RETUNE_PROJECT", str(project))
    for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_CACHE", "RETUNE_PROMPTS"):
        monkeypatch.delenv(name, raising=False)
    return world(project)


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
