"""The users of MLflow: `python -m retune.production.mlflow_users DATABASE`, with the tables that they are kept in.

`admin` gives the other people their accounts; its password is changed in MLflow, and never again from here. `retune` is who the tasks
log in as: it owns the experiments and registered models that they make, and its password follows the environment.
"""

import os
import sys
from collections.abc import Mapping

__all__ = ["main"]


def main(database: str, environ: Mapping[str, str]) -> None:
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(database)  # type: ignore[no-untyped-call]  # brings the tables to the installed version
    if not store.has_user("admin"):
        store.create_user("admin", environ["MLFLOW_ADMIN_PASSWORD"], is_admin=True)
    if store.has_user("retune"):
        store.update_user("retune", password=environ["MLFLOW_TASKS_PASSWORD"])
    else:
        store.create_user("retune", environ["MLFLOW_TASKS_PASSWORD"])


if __name__ == "__main__":
    main(sys.argv[1], os.environ)
