"""Runs fault scenarios, and writes benchmarks/faults.json and the table of docs/reliability.md after each.

examples:
  python tests/faults/run.py                        all of them (`make faults`)
  python tests/faults/run.py --fast                 those that CI runs too
  python tests/faults/run.py --only kill-tune       one; may be repeated; a name may end in *
  python tests/faults/run.py --list                 names, faults, stages

The exit code is 1 if one did not recover, lost or doubled anything, or could not be counted.
"""

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "integration"), str(TESTS / "unit"), str(TESTS.parent / "src")]
sys.path.remove(str(Path(__file__).parent)) if str(Path(__file__).parent) in sys.path else None

from faults import everything, report  # noqa: E402, F401  everything: enters the scenarios
from faults.scenario import SCENARIOS, Bench, NotPossible  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a scenario, or several by a pattern; may be repeated")
    parser.add_argument("--fast", action="store_true", help="those that CI runs too")
    parser.add_argument("--seed", type=int, metavar="N", help="of the moments that are left to chance; without it another one each time")
    parser.add_argument("--list", action="store_true", help="names, and nothing is run")
    options = parser.parse_args(arguments)
    unknown = [pattern for pattern in options.only or [] if not any(fnmatch(name, pattern) for name in SCENARIOS)]
    if unknown:
        parser.error(f"no scenario is called {', '.join(unknown)}; see --list")
    chosen = [
        one
        for one in SCENARIOS.values()
        if (not options.only or any(fnmatch(one.name, pattern) for pattern in options.only)) and (one.fast or not options.fast)
    ]
    if options.list:
        for one in chosen:
            print(f"{one.name:26}{'fast ' if one.fast else '     '}{one.fault}: {one.stage}. {one.did}")
        return 0
    import pytest  # what the S3 server's module raises where it cannot be installed

    bad, seed = 0, random.randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    report.write(report.read())
    with tempfile.TemporaryDirectory(prefix="retune-faults-", ignore_cleanup_errors=True) as folder, Bench(Path(folder), seed) as bench:
        for one in chosen:
            begun = time.monotonic()
            try:
                row = one.run(bench)
            except (NotPossible, pytest.skip.Exception) as reason:
                report.write(report.read(), skipped=report.skipped([one.name], str(reason))[0])
                print(f"{one.name}: not run: {reason}", flush=True)
                continue
            except (Exception, pytest.fail.Exception):  # noqa: BLE001  one scenario's end must not be that of the others
                bad += 1
                failed = traceback.format_exc()
                print(f"{one.name}: FAILED\n{failed}", flush=True)
                reason_told = f"the last attempt failed: {failed.strip().splitlines()[-1][:200]}"
                report.write(report.read(), skipped=report.skipped([one.name], reason_told)[0])
                continue
            report.write(report.read(), row)
            good = row["recovered"] and not row["lost"] and not row["doubled"]
            bad += not good
            print(
                f"{one.name}: {'recovered' if row['recovered'] else 'NOT RECOVERED'} in {row['seconds']} s, lost {row['lost']}, "
                f"doubled {row['doubled']} ({time.monotonic() - begun:.0f} s in all): {row['happened']}",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
