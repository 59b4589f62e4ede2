"""Puts files into a prompt's landing zone, whole or not at all."""

import hashlib
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from retune.config import Prompt
from retune.errors import BadInputError
from retune.settings import Settings

__all__ = ["Landed", "land"]

Landed = dict[str, str]
"""What became of a file: {"file": name, "at": where it is now, "state": landed | replaced | unchanged}."""


def land(settings: Settings, prompt: Prompt, files: list[Path], replace: bool = False) -> list[Landed]:
    """Copies files into the landing zone; one that is there with the same bytes stays.

    Raises BadInputError, before anything is copied, if a file is missing or would replace other content without `replace`.
    """
    if missing := [str(f) for f in files if not f.is_file()]:
        raise BadInputError(f"no such file: {', '.join(missing)}")
    names = [f.name for f in files]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise BadInputError(f"two files of one name would replace each other: {', '.join(twice)}")
    path = prompt.source.path
    zone: _Folder | _Bucket = _Bucket(path, settings.s3_endpoint) if path.startswith("s3://") else _Folder(settings.project / path)
    states = {f: zone.state(f) for f in files}
    other = [f.name for f in files if states[f] == "other"]
    if other and not replace:
        raise BadInputError(f"{path} holds other content under {', '.join(other)}: land it under another name, or pass --replace")
    landed = []
    for file in files:
        if states[file] != "same":
            zone.put(file)
        state = {"same": "unchanged", "other": "replaced", "absent": "landed"}[states[file]]
        landed.append({"file": str(file), "at": zone.address(file.name), "state": state})
    return landed


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def address(self, name: str) -> str:
        return str(self.folder / name)

    def state(self, file: Path) -> str:
        there = self.folder / file.name
        if not there.exists():
            return "absent"
        return "same" if _sha256(there) == _sha256(file) else "other"

    def put(self, file: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A name that begins with a dot is none of the zone's objects: ingest never sees half a file.
        scratch = self.folder / f".{file.name}.{os.getpid()}"
        try:
            with file.open("rb") as source, scratch.open("wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
            scratch.replace(self.folder / file.name)
        finally:
            scratch.unlink(missing_ok=True)


class _Bucket:
    """An S3 PUT is whole or not at all by itself."""

    def __init__(self, url: str, endpoint: str | None) -> None:
        from retune.store import s3_client

        place = urlsplit(url)
        self.bucket, self.prefix = place.netloc, place.path.strip("/")
        self.client = s3_client(endpoint)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def address(self, name: str) -> str:
        return f"s3://{self.bucket}/{self._key(name)}"

    def state(self, file: Path) -> str:
        try:
            body = self.client.get_object(Bucket=self.bucket, Key=self._key(file.name))["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return "absent"
        return "same" if hashlib.sha256(body).hexdigest() == _sha256(file) else "other"

    def put(self, file: Path) -> None:
        self.client.upload_file(str(file), self.bucket, self._key(file.name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
