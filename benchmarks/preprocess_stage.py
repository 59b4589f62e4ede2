"""Stage preprocess executed against restored, through the same call."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rows import Row, interleaved, ratios

from retune.config import load_prompt
from retune.ledger import Ledger
from retune.settings import Settings
from retune.tasks.ingest import ingest
from retune.workspace import Workspaces

__all__ = ["measure"]

ROOT = Path(__file__).parents[1]


def measure(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        landing = Path(scratch) / "home/landing"
        landing.mkdir(parents=True)
        for file in (ROOT / "examples/batches/ticket_priority/1").iterdir():
            shutil.copy(file, landing)
        prompts = Path(scratch) / "prompts"
        prompts.mkdir()
        text = (ROOT / "prompts/ticket_priority.yaml").read_text("utf-8").replace(".retune/landing/ticket_priority", str(landing))
        (prompts / "ticket_priority.yaml").write_text(text, "utf-8")
        os.environ |= {"RETUNE_PROJECT": str(ROOT), "RETUNE_HOME": str(Path(scratch) / "home"), "RETUNE_PROMPTS": str(prompts)}
        quiet: Callable[[str], None] = lambda _: None  # noqa: E731
        ingest("ticket_priority", "bench", "bench", quiet)
        settings = Settings.load()
        workspaces = Workspaces(settings, quiet)
        head = Ledger(workspaces.store, "dataset").head()
        assert head is not None  # noqa: S101 - a benchmark that ingested nothing must not go on
        prompt = load_prompt(prompts / "ticket_priority.yaml")
        lineage = workspaces.lineage(head.body["data"], head.n)
        index = Path(settings.store) / "sections"

        def executed() -> None:
            shutil.rmtree(index, ignore_errors=True)
            workspaces.run("preprocess", prompt, lineage)

        functions = {"executed": executed, "restored": lambda: workspaces.run("preprocess", prompt, lineage)}
        seconds = interleaved(functions, 1 if quick else 3)
        return [ratios("stage preprocess", "executed / restored, 338 rows", seconds["executed"], seconds["restored"])]
