"""One way to build inputs for training, evaluation and serving, and everything that runs a release.

Letters in the docstrings: B rows of a batch, T tokens, P virtual tokens, H hidden size, V vocabulary, C labels, N rows, K answer tokens.

This package, with `retune.errors`, `retune.config` and `retune.text`, travels as code inside an MLflow model version: it imports neither
peft, mlflow, airflow nor dvc (`pyfunc_model` alone imports mlflow). Modules are imported by name; nothing is imported here, so that
`retune.inference.requirements` stays light.
"""
