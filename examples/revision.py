"""Writes data.dvc and dvc.lock as `make demo` leaves them after both batches: where a fresh checkout starts.

    python examples/revision.py [--out FOLDER]      (default: the project)

dvc.lock holds the stages resolve and preprocess: their outputs are the same bytes everywhere, those of tune only on like machines.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

PROMPT, BATCHES = "ticket_priority", ("1", "2")
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="retune-revision-") as scratch:
        landing = Path(scratch) / "home/landing"
        landing.mkdir(parents=True)
        prompts = Path(scratch) / "prompts"
        prompts.mkdir()
        text = (ROOT / f"prompts/{PROMPT}.yaml").read_text("utf-8")
        (prompts / f"{PROMPT}.yaml").write_text(text.replace(f".retune/landing/{PROMPT}", str(landing)), "utf-8")
        os.environ |= {"RETUNE_PROJECT": str(ROOT), "RETUNE_HOME": str(Path(scratch) / "home"), "RETUNE_PROMPTS": str(prompts)}
        for name in ("RETUNE_STORE", "RETUNE_CACHE"):
            os.environ.pop(name, None)
        # Settings are read when these are imported and called, so that only the scratch folder is written to.
        from retune.config import load_prompt
        from retune.ledger import Ledger
        from retune.settings import Settings
        from retune.tasks.ingest import ingest
        from retune.workspace import Workspaces

        for batch in BATCHES:
            for file in sorted((ROOT / "examples/batches" / PROMPT / batch).iterdir()):
                shutil.copy(file, landing)
            ingest(PROMPT, f"batch {batch}", "examples/revision.py")
        os.environ["RETUNE_PROMPTS"] = str(ROOT / "prompts")  # as it stands in the repository, not with the scratch folder's landing zone
        workspaces = Workspaces(Settings.load())
        head = Ledger(workspaces.store, "dataset").head()
        if head is None:
            raise SystemExit("nothing was ingested")
        lineage = workspaces.lineage(head.body["data"], head.n)
        lineage = workspaces.run("preprocess", load_prompt(ROOT / f"prompts/{PROMPT}.yaml"), lineage).lineage
    (out / "data.dvc").write_text(lineage.data, "utf-8")
    (out / "dvc.lock").write_text(lineage.lock, "utf-8")
    print(f"wrote {out / 'data.dvc'} and {out / 'dvc.lock'}")


if __name__ == "__main__":
    main()
