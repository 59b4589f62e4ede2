"""The landing zone: a folder or an S3 prefix whose objects others write, and may replace while they are read."""

import hashlib
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from botocore.exceptions import BotoCoreError, ClientError

from retune.errors import ConfigError, StageError

__all__ = ["FORMATS", "Landing", "LandingObject", "S3Object", "StoredFile", "file_sha256", "format_of", "open_objects", "shown"]

FORMATS = ("csv", "tsv", "jsonl", "ndjson", "parquet", "csv.gz", "tsv.gz", "jsonl.gz", "ndjson.gz")
_BLOCK = 1 << 20
_MISLEADING = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""Unicode categories: control, format (direction marks, zero width), private, surrogates, line and paragraph separators. Not unassigned
characters: which these are depends on Python's age."""
_JOINERS = "\u200c\u200d"
"""Persian and Hindi spell with them, and emoji are made of several: harmless in the midst of letters."""


class LandingObject(Protocol):
    """One landed object; `snapshot` gives a local file that is known to be what `fingerprint` names."""

    @property
    def key(self) -> str:
        """Path relative to the landing zone, with forward slashes."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def fingerprint(self) -> str:
        """Changes when the object does; cheap to ask for."""

    def snapshot(self) -> AbstractContextManager[Path]:
        """A local file with the object's bytes. Raises StageError when the object is replaced meanwhile."""


@dataclass(frozen=True)
class Landing:
    objects: tuple[LandingObject, ...]
    """Sorted by key."""
    skipped: tuple[tuple[str, str], ...]
    """Key, as `shown`, and reason of what is not read."""


def format_of(key: str) -> str | None:
    """`csv`, `tsv`, `jsonl` or `parquet`, each also as `.gz` but parquet; None for anything else."""
    lowered = key.lower()
    for suffix in FORMATS:
        if lowered.endswith(f".{suffix}"):
            return suffix.replace("ndjson", "jsonl")
    return None


def open_objects(path: str, *, root: Path = Path(), s3: Any = None) -> Landing:
    """Lists a landing zone.

    `path` is a folder, relative to `root`, or s3://bucket/prefix, for which `s3` is a boto3 client. Raises ConfigError where there is no
    such folder or bucket, StageError where the endpoint does not answer.
    """
    if path.startswith("s3://"):
        return _sorted(_list_bucket(path, s3))
    folder = root / path
    if not folder.is_dir():
        raise ConfigError(f"source.path must be a folder or s3://bucket/prefix, got {path!r}: there is no folder {folder}")
    return _sorted(_list_folder(folder))


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """An object of a landing folder."""

    path: Path
    key: str
    size: int
    fingerprint: str
    inside: Path
    """The landing folder, links resolved."""

    @contextmanager
    def snapshot(self) -> Iterator[Path]:
        self._verify()
        try:
            yield self.path
        finally:
            self._verify()

    def _verify(self) -> None:
        try:
            now = _link_reason(self.path, self.inside) or _file_fingerprint(self.path)
        except FileNotFoundError:
            now = "nothing"
        if now != self.fingerprint:
            raise _replaced(self, now)


@dataclass(frozen=True)
class S3Object:
    """An object below an S3 prefix; `snapshot` downloads it into a temporary file, block by block."""

    client: Any
    bucket: str
    path: str
    key: str
    size: int
    fingerprint: str

    @contextmanager
    def snapshot(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="retune-landing-") as folder:
            local = Path(folder) / "object"
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.path)
                found = _s3_fingerprint(answer["ETag"], answer["ContentLength"])
                if found == self.fingerprint:
                    with local.open("wb") as stream:
                        for block in answer["Body"].iter_chunks(_BLOCK):
                            stream.write(block)
            except ClientError as error:
                raise _s3_error(error, f"s3://{self.bucket}/{self.path}") from error
            except BotoCoreError as error:
                raise StageError(f"reading s3://{self.bucket}/{self.path} failed: {error}; a retry may help") from error
            if found != self.fingerprint or local.stat().st_size != self.size:
                raise _replaced(self, found)
            yield local


def _replaced(item: LandingObject, now: str) -> StageError:
    return StageError(f"{item.key} was replaced while it was read (fingerprint {item.fingerprint}, now {now}); a retry reads it anew")


def _sorted(found: Iterator[LandingObject | tuple[str, str]]) -> Landing:
    objects, skipped = [], []
    for item in found:
        if isinstance(item, tuple):
            skipped.append(item)
        else:
            objects.append(item)
    return Landing(tuple(sorted(objects, key=lambda item: item.key)), tuple(sorted(skipped)))


def _skip_reason(key: str) -> str | None:
    if any(_misleads(key, place) for place in range(len(key))):
        return "control, direction or invisible characters in its name; land it under another"
    if not {"", ".", ".."}.isdisjoint(key.split("/")):
        return "its name is no plain relative path; land it under another"
    name = PurePosixPath(key)
    if any(part.startswith((".", "_")) for part in name.parts):
        return "hidden: a name starts with . or _"
    if name.suffix.lower() in (".part", ".tmp", ".crdownload"):
        return f"not complete yet: {name.suffix}"
    if format_of(key) is None:
        return f"unknown suffix {name.suffix!r}; known: {', '.join('.' + suffix for suffix in FORMATS)}"
    return None


def shown(key: str) -> str:
    """The key with what would not be seen, or would change how a line of a log reads, as its number."""
    return "".join(f"\\u{{{ord(c):x}}}" if _misleads(key, place) else c for place, c in enumerate(key))


def _misleads(key: str, place: int) -> bool:
    if key[place] in _JOINERS:
        return not (0 < place < len(key) - 1 and _joined(key[place - 1]) and _joined(key[place + 1]))
    return unicodedata.category(key[place]) in _MISLEADING


def _joined(character: str) -> bool:
    """Letters of scripts that have joiners, their marks, and emoji; between two others a joiner would only hide."""
    return not character.isascii() and unicodedata.category(character)[0] in "LMS"


def _file_fingerprint(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def _list_folder(folder: Path) -> Iterator[LandingObject | tuple[str, str]]:
    inside = folder.resolve()
    for path in folder.rglob("*"):
        key = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if reason := _skip_reason(key) or _link_reason(path, inside):
            yield shown(key), reason
        else:
            yield StoredFile(path, key, path.stat().st_size, _file_fingerprint(path), inside)


def _link_reason(path: Path, inside: Path) -> str | None:
    if not path.is_symlink():
        return None if path.is_file() else "no plain file"
    if not path.is_file():
        return "a link to no file; files of a linked folder are not read: land them themselves"
    if not path.resolve().is_relative_to(inside):
        return "a link out of the landing folder; land the file itself"
    return None


def _list_bucket(uri: str, client: Any) -> Iterator[LandingObject | tuple[str, str]]:
    if client is None:
        raise ConfigError(f"source.path {uri!r} needs an S3 client; set AWS_ENDPOINT_URL_S3 and credentials in the environment")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    try:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                path = entry["Key"]
                key = path[len(prefix) :]
                if path.endswith("/"):
                    continue
                if reason := _skip_reason(key):
                    yield shown(key), reason
                else:
                    yield S3Object(client, bucket, path, key, entry["Size"], _s3_fingerprint(entry["ETag"], entry["Size"]))
    except ClientError as error:
        raise _s3_error(error, uri) from error
    except BotoCoreError as error:
        raise StageError(f"listing {uri} failed: {error}; a retry may help") from error


def _s3_fingerprint(etag: str, size: int) -> str:
    return f"{etag.strip(chr(34))}-{size}"


def _s3_error(error: ClientError, where: str) -> ConfigError | StageError:
    code = error.response.get("Error", {}).get("Code", "")
    if code in ("NoSuchBucket", "AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return ConfigError(f"source.path {where} cannot be read: {code}; check the bucket's name and the credentials in the environment")
    return StageError(f"reading {where} failed: {code or error}; a retry may help")
