"""`retune audit` on a folder store: what the document holds, and what it says of a record that does not hold."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from retune.cli import app
from retune.ledger import Ledger
from retune.records import Comparison, Decision, Gate, Lineage, Trigger
from retune.store import open_store

PROMPT = """
name: p
owner: support <platform>
intended_use: Ordering the queue only
task: generation
base_model: {path: model, sha256: %s}
source: landing/p
template: "{text}"
target: answer
""" % ("a" * 64)  # fmt: skip
TEMPLATE, FIRST, SECOND = "0" * 64, "a" * 64, "b" * 64
MACHINE = {"torch": "2.13.0+cpu", "cpus": 2, "gpus": []}


def lineage(revision: int, dirty: bool = False) -> dict[str, Any]:
    machines = {"preprocess": MACHINE, "tune": MACHINE, "evaluate": {**MACHINE, "cpus": 64}}
    return Lineage("outs: []", "stages: {}", {"tune.seed": 14}, "c" * 40, dirty, "e" * 64, revision, machines).to_json()


def judgement(verdict: str, reasons: list[str], release: str, version: str | None, comparison: str, **more: Any) -> dict[str, Any]:
    """What `retune.tasks.verdict` appends of a decision, the champion apart."""
    gates = [
        Gate("looks", True, "within", 0.0, 0.05),
        Gate("gain", verdict == "PROMOTE", reasons[0], 0.11, 0.02, 0.01, 0.21),
        *([Gate("approval", True, "Approved by anna: go ahead.")] if verdict == "PROMOTE" else []),
    ]
    compared = Comparison("rougeL", 0.61, 0.5, 0.11, 0.01, 0.21, 0.0004, 0.9997, 0.999, 20_800, 173)
    return {
        "decision": Decision(verdict, reasons, [gate.to_json() for gate in gates], compared.to_json()).to_json(),
        "candidate": {
            "release": release,
            "version": version,
            "metrics": {"rougeL": 0.61, "perplexity": None},
            "trial": {"name": "1: as is"},
        },
        "champion_before": {"release": TEMPLATE, "version": "1", "metrics": {"rougeL": 0.5, "perplexity": 7.25}},
        "baseline": {"release": TEMPLATE, "metrics": {"rougeL": 0.5, "perplexity": 7.25}},
        "look": {"split": "d" * 64, "comparison": comparison, "takes": 0.001},
        "fingerprint": "f" * 64,
        "dag_run_id": "run-1",
        "mlflow_run_id": "3f" * 16,
        "rows": 338,
        "triggered": Trigger("retrain_p", "run-1", "manual", "bob", "slower rate", "https://airflow.test/runs/1").to_json(),
        **more,
    }


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Founded, promoted, held, rolled back and unbarred, on two revisions of the data."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "p.yaml").write_text(PROMPT)
    for name in ("RETUNE_HOME", "RETUNE_STORE", "RETUNE_PROMPTS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RETUNE_PROJECT", str(tmp_path))
    place = open_store(tmp_path / ".retune/store")
    data, head = Ledger(place, "dataset"), None
    for rows in (10, 25):
        landed = {"sequence": 1, "rows": rows + 5, "kept": rows, "duplicates": 2, "quarantined": {"too_long": 3}, "redacted": {"mail": 4}}
        body = {"data": "outs: []", "rows": {"p": rows}, "objects": {"p": {"one.csv": landed}}}
        head = data.append("revision", "ingest", "1 landed object(s) of p", body, head)
    template, first = ({"release": release, "version": version, "metrics": {}} for release, version in ((TEMPLATE, "1"), (FIRST, "2")))
    ledger = Ledger(place, "p")
    entry = ledger.append("found", "tester", "the template alone", {"champion": template, "lineage": lineage(0)}, None)
    promoted = judgement("PROMOTE", ["better by 0.11", "Approved by anna: go ahead."], FIRST, "2", "1" * 64)
    entry = ledger.append("promote", "tester", "better by 0.11", {**promoted, "champion": first, "lineage": lineage(0)}, entry)
    held = judgement("HOLD", ["too close to | call"], SECOND, None, "2" * 64, checks=[{"name": "greets", "passed": True}])
    entry = ledger.append("hold", "tester", "too close to | call", {**held, "champion": first, "lineage": lineage(1, dirty=True)}, entry)
    left = {"release": FIRST, "version": "2"}
    body = {"champion": template, "from": FIRST, "to": TEMPLATE, "left": left, "answer": {"by": "carol", "comment": "now"}}
    entry = ledger.append("rollback", "carol", "<script>alert(1)</script> answers are worse\n# now", body, entry)
    ledger.append("unbar", "dave", "it was the data", {"release": FIRST, "champion": template}, entry)
    return tmp_path / ".retune/store"


def call(*arguments: str):
    return CliRunner().invoke(app, ["audit", "p", *arguments])


def section(text: str, name: str) -> str:
    """The part of a Markdown document under the heading that begins so, up to the next one of its level or above."""
    level, rest = re.search(rf"^(#+) {re.escape(name)}(.*)\Z", text, re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^#{{2,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def test_it_begins_with_what_stands_and_whether_it_verifies(store: Path) -> None:
    text = call().output
    top = text[: text.index("## Entries")]
    head = json.loads(call("--json").output)["heads"]["p"]
    assert head["n"] == 4
    assert "The record verifies. Every entry was read (5 of the ledger p and 2 of the ledger dataset)" in top
    assert f"- **Head of the ledger p**: entry 4, sha256 `{head['sha256']}`" in top
    assert "- **Owner**: support &lt;platform>" in top
    assert "- **Entries**: 1 found, 1 promote, 1 hold, 1 rollback, 1 unbar" in top
    assert f"- **Champion**: `{TEMPLATE}` (version 1), since " in top
    assert "- **Barred**: none" in top
    assert [line.split(" | ")[2] for line in top.splitlines() if re.match(r"\| \d", line)] == [
        "found",
        "promote",
        "hold",
        "rollback",
        "unbar",
    ]


def test_a_decision_comes_with_all_its_evidence(store: Path) -> None:
    text = call().output
    promoted, held = section(text, "Entry 1: promote"), section(text, "Entry 2: hold")
    for line in (
        f"- **Champion from here on**: `{FIRST}` (version 2)",
        f"- **Champion until then**: `{TEMPLATE}` (version 1)",
        "- **Approval**: Approved by anna: go ahead.",
        "#### Verdict: PROMOTE",
        "| gain | passed | 0.11 | 0.01 to 0.21 | 0.02 | better by 0.11 |",
        "| rougeL | 0.5 | 0.5 | 0.61 |",
        "| perplexity | 7.25 | 7.25 | none |",
        "- **Lower end of the gain's interval**: 0.01",
        "- **Chance of such a gain or a larger one, were both equally good**: 0.0004",
        "- **Dataset revision**: 0, 338 rows of the prompt",
        f"- **Code**: commit `{'c' * 40}`, nothing uncommitted",
        f"- **Environment**: lock file's sha256 `{'e' * 64}`",
        '- **Overrides**: `{"tune.seed": 14}`',
        "- **Machine of preprocess, tune**: cpus 2, gpus none, torch 2.13.0+cpu",
        "- **Machine of evaluate**: cpus 64, gpus none, torch 2.13.0+cpu",
        f"- **MLflow run**: `{'3f' * 16}`",
        "- **DAG run**: [run-1](<https://airflow.test/runs/1>)",
        "- **Started**: manual, by bob: slower rate",
    ):
        assert line in promoted.splitlines()
    assert f"- **Champion stays**: `{FIRST}` (version 2)" in held
    assert f"- **Candidate**: `{SECOND}` (not registered)" in held
    assert "| gain | failed: HOLD |" in held
    assert "too close to \\| call" in held
    assert "WITH UNCOMMITTED CHANGES" in held
    assert "- **Approval**: no person was asked" in held


def test_looks_that_were_spent_before_a_decision_are_added_up(store: Path) -> None:
    text = call().output
    looks = [re.search(r"takes (.*?) % of chance; (\d+) other.* had taken (.*?) %", section(text, f"Entry {n}")).groups() for n in (1, 2)]
    assert looks == [("0.1", "0", "0"), ("0.1", "1", "0.1")]


def test_a_rollback_says_from_where_to_where_and_an_unbar_what_it_lifts(store: Path) -> None:
    text = call().output
    back = section(text, "Entry 3: rollback")
    assert f"- **Champion from here on**: `{TEMPLATE}` (version 1)" in back
    assert f"- **Barred**: `{FIRST}` (version 2)" in back
    assert "- **Who**: carol" in back
    assert "- **Chosen by**: by carol, comment now" in back
    assert f"- **No longer barred**: `{FIRST}` (version 2)" in section(text, "Entry 4: unbar")


def test_the_data_that_decisions_refer_to_are_accounted_for(store: Path) -> None:
    text = call().output
    assert "| one.csv | 30 | 25 | 2 | 3 too long | 4 mail |" in section(text, "Revision 1")
    assert "- **Rows kept**: 10" in section(text, "Revision 0")


def test_what_an_entry_holds_and_nobody_foresaw_is_shown(store: Path) -> None:
    assert "| name | passed |\n| --- | --- |\n| greets | yes |" in section(call().output, "Entry 2: hold")


def test_the_same_ledgers_give_the_same_bytes(store: Path, tmp_path: Path) -> None:
    for name in ("one.html", "two.html", "one.md", "two.md"):
        assert call("--out", str(tmp_path / name)).exit_code == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert (tmp_path / "one.md").read_bytes() == (tmp_path / "two.md").read_bytes()
    assert (tmp_path / "one.md").read_text("utf-8") == call().output
    assert call("--format", "html").output == (tmp_path / "one.html").read_text("utf-8")


class Page(HTMLParser):
    """Tags with their attributes, and the text; raises where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self._open = "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_page_loads_nothing_and_takes_no_tag_from_the_ledger(store: Path) -> None:
    page = Page(call("--format", "html").output)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"} == set()
    assert "<script>alert(1)</script> answers are worse" in page.words
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert links == {"https://airflow.test/runs/1", *(f"#entry-{n}" for n in range(5)), "#revision-0", "#revision-1"}
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} <= places
    assert all(word in page.words for word in ("Name", "Date", "Signature"))
    assert "&lt;script>alert(1)&lt;/script> answers are worse # now" in section(call().output, "Entry 3: rollback")


def changed(place: Path) -> None:
    place.write_bytes(place.read_bytes().replace(b"better by 0.11", b"better by 0.91"))


def garbled(place: Path) -> None:
    place.write_bytes(b"{}")


@pytest.mark.parametrize(
    ("name", "n", "damage", "words"),
    [
        ("p", 1, changed, "entry 1 (ledger/p/00000001.json) was changed"),
        ("p", 1, garbled, "entry 1 (ledger/p/00000001.json) is damaged"),
        ("p", 2, Path.unlink, "entry 2 (ledger/p/00000002.json) is missing"),
        ("p", 0, Path.unlink, "entry 0 (ledger/p/00000000.json) is missing"),
        ("p", 4, garbled, "entry 4 (ledger/p/00000004.json) is damaged"),
        ("dataset", 0, garbled, "ledger dataset: entry 0 (ledger/dataset/00000000.json) is damaged"),
        ("dataset", 1, Path.unlink, "the ledger dataset has no revision 1, which entries of p refer to"),
    ],
)
def test_a_record_that_does_not_hold_is_written_all_the_same_and_fails(
    store: Path, tmp_path: Path, name: str, n: int, damage: Callable[[Path], None], words: str
) -> None:
    place = store / "ledger" / name / f"{n:08d}.json"
    place.chmod(0o600)
    damage(place)
    result = call("--out", str(tmp_path / "p.html"))
    assert result.exit_code == 1
    assert "error: the history of p does not verify" in result.output
    assert words in result.output
    page = Page((tmp_path / "p.html").read_text("utf-8"))
    assert "THE RECORD DOES NOT VERIFY" in page.words
    assert "The record verifies" not in page.words
    assert words in page.words
    assert ("p", {"class": "bad", "role": "alert"}) in page.tags
    kinds = ["found", "promote", "hold", "rollback", "unbar"]
    for other in {0, 1, 2, 3, 4} - ({n} if name == "p" and damage is not changed else set()):
        assert f"Entry {other}: {kinds[other]}" in page.words
    if name == "p" and damage is not changed:
        assert f"Entry {n}: cannot be read" in page.words
    found = json.loads(call("--json").stdout)
    assert (found["verified"], [words in problem for problem in found["problems"]].count(True)) == (False, 1)


def test_an_entry_in_another_shape_is_a_problem_and_no_crash(store: Path, tmp_path: Path) -> None:
    """Written with the right hashes, by something other than Retune."""
    ledger = Ledger(open_store(store), "p")
    ledger.append("promote", "mallory", "trust me", {"decision": {"verdict": "PROMOTE"}, "champion": "me"}, ledger.head())
    result = call("--out", str(tmp_path / "p.md"))
    assert result.exit_code == 1
    assert "entry 5 is not of the shape that Retune writes" in section((tmp_path / "p.md").read_text("utf-8"), "Entry 5: cannot be read")


def test_the_file_s_name_says_the_format_and_a_wrong_one_is_named(store: Path, tmp_path: Path) -> None:
    assert call("--out", str(tmp_path / "p.txt")).exit_code == 2
    assert call("--out", str(tmp_path / "p.txt"), "--format", "md").exit_code == 0
    missing = call("--out", str(tmp_path / "nowhere/p.md"))
    assert (missing.exit_code, "nowhere/p.md cannot be written: No such file or directory" in missing.output) == (2, True)
    assert call("--format", "pdf").exit_code == 2


def test_neither_mlflow_nor_anything_heavy_is_needed(store: Path) -> None:
    code = (
        "import sys\nfrom retune.cli import app\napp(['audit', 'p'], standalone_mode=False)\n"
        "print([m for m in ('airflow', 'mlflow', 'torch', 'pandas', 'sklearn') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "The record verifies" in done.stdout
