"""Settings from the environment: endpoints and places, never secrets' values. `.env.example` lists them all."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retune.errors import ConfigError

__all__ = ["Settings", "without_password"]


@dataclass(frozen=True)
class Settings:
    project: Path
    """Folder with dvc.yaml (RETUNE_PROJECT; else the nearest one above the working directory)."""
    home: Path
    """State of the embedded default (RETUNE_HOME; else `.retune` in the project)."""
    store: str
    """Folder or s3://bucket/prefix of the DVC remote, ledgers and sections (RETUNE_STORE)."""
    cache: Path
    """DVC cache shared by all tasks of a host (RETUNE_CACHE)."""
    prompts: Path
    """Folder of the prompt files (RETUNE_PROMPTS)."""
    base_models: tuple[Path, ...]
    """Folders in which base models are looked up by hash (RETUNE_BASE_MODELS, separated like PATH)."""
    tracking_uri: str
    """MLflow server or database (MLFLOW_TRACKING_URI)."""
    mlflow_url: str
    """Where people open MLflow, for links (RETUNE_MLFLOW_URL; else the tracking URI, without a password)."""
    s3_endpoint: str | None
    """S3 endpoint where it is not AWS (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL)."""
    require_clean: bool
    """Refuse to promote a release that was tuned from a dirty checkout (RETUNE_REQUIRE_CLEAN=1)."""
    device_hour_price: float | None = None
    """What an hour of a tuning worker costs, all its devices together, in any currency (RETUNE_DEVICE_HOUR_PRICE); None: not known."""
    gpu_pod_template: str | None = None
    """Pod template of the tasks that run a model, as the scheduler's own file system has it (RETUNE_GPU_POD_TEMPLATE); None: no pods."""

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ, cwd: Path | None = None) -> "Settings":
        """Raises ConfigError if no project is found, or a value is wrong."""
        project = Path(environ["RETUNE_PROJECT"]) if environ.get("RETUNE_PROJECT") else _find_project(cwd or Path.cwd())
        project = project.resolve()
        if not (project / "dvc.yaml").is_file():
            raise ConfigError(f"RETUNE_PROJECT must be a folder with dvc.yaml, got {project}")
        home = (project / (environ.get("RETUNE_HOME") or ".retune")).resolve()
        store = environ.get("RETUNE_STORE") or str(home / "store")
        if "://" not in store:
            store = str((project / store).resolve())
        elif not store.startswith("s3://"):
            raise ConfigError(f"RETUNE_STORE must be a folder or s3://bucket/prefix, got {without_password(store)!r}")
        models = environ.get("RETUNE_BASE_MODELS")
        tracking_uri = environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
        return cls(
            project=project,
            home=home,
            store=store,
            cache=(project / (environ.get("RETUNE_CACHE") or home / "cache")).resolve(),
            prompts=(project / (environ.get("RETUNE_PROMPTS") or "prompts")).resolve(),
            base_models=tuple((project / p).resolve() for p in models.split(os.pathsep)) if models else (project / "examples",),
            tracking_uri=tracking_uri,
            mlflow_url=without_password(environ.get("RETUNE_MLFLOW_URL") or tracking_uri).rstrip("/"),
            s3_endpoint=environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None,
            require_clean=environ.get("RETUNE_REQUIRE_CLEAN", "0") == "1",
            device_hour_price=_price(environ.get("RETUNE_DEVICE_HOUR_PRICE")),
            gpu_pod_template=_pod_template(environ.get("RETUNE_GPU_POD_TEMPLATE")),
        )


_USER = re.compile(
    # A password may hold a slash where SQLAlchemy reads it; in an address of the web, a port and a path with an @ look alike.
    r"(?<!http)(?<!https)://[^/\s:@]*:(?:(?!://)\S)*@"
    r"|://[^/\s:@]*:(?!\d+/)(?:(?!://)\S)*@"
    r"|://[^/\s]*@"
)
_SECRET = re.compile(r"(?i)([?&][^=&\s]*(?:passw|pwd|secret|token|signature)[^=&\s]*=)[^&\s]*")


def without_password(address: str) -> str:
    """An address, or a text with addresses in it, that may be shown: without `user:password@`, and without what `?password=` says."""
    return _SECRET.sub(r"\1***", _USER.sub("://", address))


def _price(text: str | None) -> float | None:
    if not text:
        return None
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price >= 0):
        raise ConfigError(f"RETUNE_DEVICE_HOUR_PRICE must be a number of 0 or more, what an hour of a tuning worker costs, got {text!r}")
    return price


def _pod_template(path: str | None) -> str | None:
    if path and not Path(path).is_absolute():
        raise ConfigError(f"RETUNE_GPU_POD_TEMPLATE must be an absolute path, the one at which the scheduler finds the file, got {path!r}")
    return path or None


def _find_project(cwd: Path) -> Path:
    for folder in (cwd, *cwd.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise ConfigError(f"no project here: {cwd} and the folders above it hold no dvc.yaml; go to a Retune checkout or set RETUNE_PROJECT")
