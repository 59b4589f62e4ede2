"""Measures what the docs claim, as ratios within one run.

Rows of `figure, case, value, low, high, unit`: median, least and most of the interleaved rounds. They are written to
benchmarks/results.json and into the table of docs/performance.md.

examples:
  python benchmarks/bench.py                               all of it, meant to end within 40 minutes on 2 cores (`make bench`)
  python benchmarks/bench.py --only memory                 one part; its rows take the place of the old ones
  python benchmarks/bench.py --only matmul --only memory   two
  python benchmarks/bench.py --only clinc150               a quarter of an hour, needs what its module says
  python benchmarks/bench.py --quick                       tiny cases, to see that everything works; writes nothing
"""

import argparse
import importlib
import os
import warnings
from collections.abc import Sequence

PARTS = {
    "training": ("training", "measure", "training samples/s, PEFT + Trainer against Retune"),
    "allocator": ("training", "measure_allocator", "three cases with and without an allocator that keeps what was freed"),
    "matmul": ("matmul_share", "measure", "share of the matmul rate, and where a step's time goes"),
    "memory": ("memory", "measure", "peak memory of a training step"),
    "inference": ("inference_speed", "measure", "label scores, generation, reuse of the prefix"),
    "convergence": ("convergence", "measure", "seconds to a validation loss on an example prompt"),
    "gate": ("gate", "measure", "paired bootstrap of BLEU and ROUGE-L against each resample scored anew"),
    "preprocess": ("preprocess_stage", "measure", "stage preprocess executed against restored"),
    "loop": ("loop", "measure", "what a run costs when nothing is new"),
    "scale": ("scale", "measure", "ingest and preprocess of a million rows, beside pandas reading and writing them"),
    "clinc150": ("clinc150", "measure", "a real encoder on real text"),
}
"""Name on the command line: module, function, what it measures. A part is imported when it is its turn."""
BY_NAME = {"clinc150": "MiniLM (22.7M, frozen) on CLINC150, 150 intents"}
"""Parts that run when they are named, since they need what the project does not bring: their figure, which the rest keeps."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = "; ".join(f"{name}: {what}" for name, (_, _, what) in PARTS.items())
    parser.add_argument("--only", action="append", choices=PARTS, metavar="NAME", help=f"one part, may be repeated ({parts})")
    parser.add_argument("--quick", action="store_true", help="tiny cases and few rounds; nothing is written")
    options = parser.parse_args(arguments)
    # Deprecations inside peft and transformers are not this run's matter; processes of their own inherit the variable.
    warnings.simplefilter("ignore")
    os.environ |= {"PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "99"}
    import report
    from rich.console import Console
    from rich.table import Table
    from rows import Row, say

    rows: list[Row] = []
    for name in options.only or [name for name in PARTS if name not in BY_NAME]:
        module, function, what = PARTS[name]
        say(f"{name}: {what}")
        rows += getattr(importlib.import_module(module), function)(options.quick)
    results: report.Results = {"machine": report.described(), "rows": rows}
    table = Table("figure", "case", "median", "least", "most", title=results["machine"])
    for row in rows:
        table.add_row(row["figure"], row["case"], *report.shown(row))
    Console().print(table)
    if options.quick:
        return
    before = report.read()
    if before is not None and not options.only:
        before = {**before, "rows": [row for row in before["rows"] if row["figure"] in BY_NAME.values()]}
    if before is not None and before["machine"] != results["machine"]:
        say(f"dropped the other figures of benchmarks/results.json: they were measured on {before['machine']}")
    report.write(report.merged(before, results))


if __name__ == "__main__":
    main()
