"""Tunes the soft prompt of a frozen language model. No MLflow, no Airflow, no DVC.

Letters in the docstrings are those of `retune.inference`: B rows of a batch, P virtual tokens, H hidden size, N rows, K answer tokens.
"""

from retune.prompt_tuning.initial import initial_prompt
from retune.prompt_tuning.methods import METHODS, tune
from retune.prompt_tuning.result import CurveRow, DivergedError, TuneResult

__all__ = ["METHODS", "CurveRow", "DivergedError", "TuneResult", "initial_prompt", "tune"]
