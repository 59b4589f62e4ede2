"""One of several processes that promote at once: `python racer.py STORE LEDGER ROUNDS NAME FOLDER`. Prints won or lost for each round.

A round is a promotion on the head that this process has seen. All wait for each other before a round, so that they do meet.
"""

import sys
import time
from pathlib import Path

from retune.errors import ConflictError
from retune.ledger import Ledger
from retune.store import open_store

address, name, rounds, me, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
ledger = Ledger(open_store(address), name)
(start / me).touch()
while not (start / "go").exists():
    time.sleep(0.002)
for n in range(rounds):
    head = ledger.head()
    while (-1 if head is None else head.n) < n - 1:
        time.sleep(0.002)
        head = ledger.head()
    if head is not None and head.n >= n:
        print("late", flush=True)
        continue
    time.sleep(0.03)
    release = f"{n}-{me}"
    try:
        ledger.append("promote", me, "a race", {"champion": {"release": release, "version": str(n)}, "dag_run_id": release}, head)
        print("won", flush=True)
    except ConflictError:
        print("lost", flush=True)
