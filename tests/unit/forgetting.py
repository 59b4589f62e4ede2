"""A folder store with two dataset revisions and what was made of them: real ingest and DVC objects, splits as the stages write them."""

import hashlib
import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from retune.config import Prompt, load_prompt
from retune.data.preprocess import preprocess
from retune.dvc_files import lock_text, md5_of
from retune.forget import Plan, append, plan, sweep
from retune.forget_files import Selection
from retune.ledger import Entry, Ledger
from retune.records import Lineage
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
        for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_CACHE", "RETUNE_PROMPTS", "MLFLOW_TRACKING_URI"):
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
    for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_CACHE", "RETUNE_PROMPTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return world(project)
