"""Faults done to real components, each a scenario that counts what was lost and doubled. `run.py` runs them; see `scenario.py`."""
