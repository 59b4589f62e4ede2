"""Small private files of the stack: written whole or not at all, readable by their owner alone."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["read_json", "write_private"]


def write_private(path: Path, text: str) -> None:
    """Replaces a file in one step; mode 0600 from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if the file is missing or does not hold one."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
