"""Writes data.dvc and dvc.lock as `make demo` leaves the data of both prompts: where a fresh checkout starts.

    python examples/revision.py [--out FOLDER]      (default: the project)

dvc.lock holds the stages resolve and preprocess: their outputs are the same bytes everywhere, those of tune only on like machines.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import yaml

BATCHES = {"ticket_summary": ("1",), "ticket_priority": ("1", "2")}
"""Prompt -> the batches that the demo takes in."""
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="retune-revision-") as scratch:
        prompts = Path(scratch) / "prompts"
        prompts.mkdir()
        for name in BATCHES:
            (Path(scratch) / "landing" / name).mkdir(parents=True)
            text = (ROOT / f"prompts/{name}.yaml").read_text("utf-8")
            (prompts / f"{name}.yaml").write_text(text.replace(".retune/landing/", f"{scratch}/landing/"), "utf-8")
        os.environ |= {"RETUNE_PROJECT": str(ROOT), "RETUNE_HOME": str(Path(scratch) / "home"), "RETUNE_PROMPTS": str(prompts)}
        for name in ("RETUNE_STORE", "RETUNE_CACHE"):
            os.environ.pop(name, None)
        # Settings are read when these are imported and called, so that only the scratch folder is written to.
        from retune.config import load_prompt
        from retune.ledger import Ledger
        from retune.settings import Settings
        from retune.tasks.ingest import ingest
        from retune.workspace import Workspaces

        for name, batches in BATCHES.items():
            for batch in batches:
                for file in sorted((ROOT / "examples/batches" / name / batch).iterdir()):
                    shutil.copy(file, Path(scratch) / "landing" / name)
                ingest(name, f"batch {batch}", "examples/revision.py")
        os.environ["RETUNE_PROMPTS"] = str(ROOT / "prompts")  # as it stands in the repository, not with the scratch folder's landing zone
        workspaces = Workspaces(Settings.load())
        head = Ledger(workspaces.store, "dataset").head()
        if head is None:
            raise SystemExit("nothing was ingested")
        lineage = workspaces.lineage(head.body["data"], head.n)
        loaded = {name: load_prompt(ROOT / f"prompts/{name}.yaml") for name in sorted(BATCHES)}
        locks = [workspaces.run("preprocess", prompt, lineage).lineage.lock for prompt in loaded.values()]
    stages = {name: section for lock in locks for name, section in yaml.safe_load(lock)["stages"].items()}
    (out / "data.dvc").write_text(lineage.data, "utf-8")
    (out / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False), "utf-8")
    print(f"wrote {out / 'data.dvc'} and {out / 'dvc.lock'}")


if __name__ == "__main__":
    main()
