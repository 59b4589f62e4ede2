"""What of a machine decides whether a stage makes the same bytes again. It stands in the lineage, never in what is hashed."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["machine"]


def machine(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Torch's version (no lock file names it), threads of a stage that this environment starts, and processors. No name of the host.

    kernels: the instruction set that torch is held to. threads: None where torch chooses for itself.
    """
    threads = environ.get("RETUNE_THREADS") or environ.get("OMP_NUM_THREADS")
    return {
        "kernels": environ.get("ATEN_CPU_CAPABILITY", "best"),
        "torch": metadata.version("torch"),
        "threads": int(threads) if threads and threads.isdigit() else None,
        "cpus": os.cpu_count(),
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "architecture": platform.machine(),
        "gpus": [_first(str(p), "Model") or "unknown" for p in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))],
    }


def _first(place: str, name: str) -> str | None:
    """Value of the first `name : value` line of a file; None without file or line."""
    try:
        lines = Path(place).read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
