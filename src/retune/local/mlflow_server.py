"""The MLflow server in one process: `python -m retune.local.mlflow_server HOST PORT DATABASE ARTIFACTS`.

The same application with the same settings as

    mlflow server --host HOST --port PORT --workers 1 --backend-store-uri DATABASE --serve-artifacts --artifacts-destination ARTIFACTS

which makes its database in one process and then serves from a second, each importing all of MLflow: 7 s of a processor and 250 MB more.
Clients need the server's address and nothing else, since artifacts go through it.
"""

import os
import sys
from pathlib import Path

__all__ = ["main"]


def main(host: str, port: str, database: str, artifacts: str) -> None:
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": database,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifacts,
        "_MLFLOW_SGI_NAME": "uvicorn",
    }
    import uvicorn
    from mlflow.server import _UVICORN_LOG_CONFIG, handlers
    from mlflow.server.fastapi_app import app

    handlers.initialize_backend_stores(database, None, "mlflow-artifacts:/")
    uvicorn.run(app, host=host, port=int(port), log_config=str(Path(_UVICORN_LOG_CONFIG)))


if __name__ == "__main__":
    main(*sys.argv[1:])
