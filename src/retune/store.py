"""A folder or an S3 prefix behind one small interface, and the only place that imports boto3.

A key is a relative path such as `ledger/support_intent/00000003.json`. An object is whole or not there: a reader never sees
a half-written one, whenever its writer was killed.
"""

import contextlib
import hashlib
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol
from urllib.parse import urlsplit

from retune.errors import ConfigError, ConflictError, RetuneError, StageError
from retune.settings import Settings, without_password

__all__ = ["FolderStore", "S3Store", "Store", "StoreKeyError", "Stored", "check_create", "open_store", "s3_client"]

CHUNK = 1 << 20
"""Bytes per piece of a streamed object."""
_TEMPORARY = ".tmp"
"""Folder of half-written files in a folder store; no key begins with it."""
_STALE = 24 * 3600.0
"""Seconds after which a half-written file was left by a process that was killed."""
_CONFLICT_TRIES = 8
"""Tries of a conditional create that S3 answers with "another one is in progress"."""
_ATTEMPTS = 5
"""Requests that botocore makes for one call before it gives up, unless AWS_MAX_ATTEMPTS says otherwise."""
_BAD_KEY = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


class StoreKeyError(RetuneError):
    """The store holds no object with this key."""


@dataclass(frozen=True)
class Stored:
    """An object as a listing shows it."""

    key: str
    size: int
    """Bytes."""
    modified: float
    """Seconds since 1970 by the storage's clock."""


class Store(Protocol):
    """Objects by key. Every method raises ConfigError for a malformed key, a missing bucket or denied access, and StageError where
    a retry may help (unreachable, overloaded or failing storage, missing credentials)."""

    url: str
    """Folder, or s3://bucket/prefix."""

    def get(self, key: str) -> bytes:
        """The object's content. Raises StoreKeyError if there is none."""
        ...

    def iter_bytes(self, key: str) -> Iterator[bytes]:
        """The object's content in pieces of at most 1 MiB. Raises StoreKeyError, at the first piece, if there is none."""
        ...

    def md5(self, key: str) -> str:
        """MD5 of the content, computed by reading it all. Raises StoreKeyError if there is none."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> "list[str]":
        """Every key that begins with `prefix`, in the order of their UTF-8 bytes."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """Writes an object that must not exist yet: of several writers exactly one succeeds.

        Raises ConflictError, for the others, naming the key.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Writes an object, replacing one that exists. For keys that tell their content: a repetition changes nothing."""
        ...

    def stored(self, prefix: str = "") -> Sequence[Stored]:
        """What `list` lists, with size and time of the last write."""
        ...

    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is as good as removed. For `retune forget` and `retune gc` alone."""
        ...


def open_store(place: Settings | str | Path, s3_endpoint: str | None = None) -> Store:
    """The store at a folder or s3://bucket/prefix, or the one that the settings name, with their endpoint. Makes no request yet.

    Raises ConfigError for any other address.
    """
    if isinstance(place, Settings):
        s3_endpoint = s3_endpoint or place.s3_endpoint
        place = place.store
    if isinstance(place, Path) or "://" not in place:
        return FolderStore(Path(place))
    return S3Store(place, s3_endpoint)


def check_create(store: Store, writers: int = 8, rounds: int = 5) -> None:
    """Races writers for the same key, and leaves one small object a round under `probe/`.

    Raises ConfigError if not exactly one of them wins: the storage ignores `If-None-Match: *`, or looks first and writes later, as
    OpenStack Swift does. The ledgers' compare-and-set rests on it.
    """
    for _ in range(rounds):
        key = f"probe/{secrets.token_hex(16)}"
        start = threading.Barrier(writers)

        def wins(n: int, key: str = key, start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                store.create(key, str(n).encode())
            except ConflictError:
                return False
            return True

        store.exists(key)  # makes the client, before the threads do
        with ThreadPoolExecutor(writers) as threads:
            won = sum(threads.map(wins, range(writers)))
        if won != 1:
            raise ConfigError(
                f"{store.url} cannot hold ledgers: {won} of {writers} writers made the same object; conditional creates must be atomic "
                "there, as in Amazon S3 or a local folder"
            )


def s3_client(endpoint: str | None = None) -> Any:
    """A boto3 S3 client: standard retries, region us-east-1 if none is set, path-style addresses for an endpoint of one's own.

    Raises ConfigError if the endpoint or the AWS configuration cannot be used.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    options: dict[str, Any] = {"mode": "standard"}
    if not os.environ.get("AWS_MAX_ATTEMPTS"):
        options["total_max_attempts"] = _ATTEMPTS
    try:
        session = boto3.session.Session()
        return session.client(
            "s3",
            endpoint_url=endpoint,
            region_name=session.region_name or "us-east-1",
            config=Config(
                retries=options,  # type: ignore[arg-type]  # a plain dict of options, typed narrowly
                connect_timeout=10,
                read_timeout=60,
                max_pool_connections=32,
                s3={"addressing_style": "path" if endpoint else "auto"},
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"no S3 client for endpoint {_shown(endpoint)}: {error}; see AWS_ENDPOINT_URL_S3 and AWS_PROFILE") from None


class FolderStore:
    """A folder, on a file system with hard links. See `Store`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._swept = False
        self.url = str(self._folder)

    def get(self, key: str) -> bytes:
        return b"".join(self.iter_bytes(key))

    def iter_bytes(self, key: str) -> Iterator[bytes]:
        path = self._path(key)
        with self._errors("read", key):
            try:
                file = path.open("rb")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise StoreKeyError(f"no object {key!r} in {self.url}") from None
            with file:
                while piece := file.read(CHUNK):
                    yield piece

    def md5(self, key: str) -> str:
        return _md5(self.iter_bytes(key))

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with self._errors("look for", key):
            return path.is_file()

    def list(self, prefix: str = "") -> "list[str]":
        return sorted(self._keys(prefix), key=str.encode)

    def stored(self, prefix: str = "") -> Sequence[Stored]:
        return [item for key in self.list(prefix) if (item := self._stored(key)) is not None]

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors("delete", key), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            _sync(path.parent)

    def _stored(self, key: str) -> Stored | None:
        """None for an object that was deleted since it was listed."""
        with self._errors("list", key), contextlib.suppress(FileNotFoundError):
            status = (self._folder / key).stat()
            return Stored(key, status.st_size, status.st_mtime)
        return None

    def _keys(self, prefix: str) -> Iterable[str]:
        folder = _checked_prefix(prefix).rpartition("/")[0]
        found = []
        with self._errors("list", prefix):
            for parent, folders, files in os.walk(self._folder / folder, onerror=_unless_missing):
                where = Path(parent).relative_to(self._folder).as_posix()
                if where == ".":
                    folders[:] = [name for name in folders if name != _TEMPORARY]
                found += [name if where == "." else f"{where}/{name}" for name in files]
        return (key for key in found if key.startswith(prefix))

    def create(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors("create", key), self._written(data) as temporary:
            _make_folder(path.parent)
            try:
                os.link(temporary, path)  # fails if the name exists, on every file system that has hard links
            except FileExistsError:
                raise ConflictError(f"{key!r} exists already in {self.url}; read it and decide again") from None
            _sync(path.parent)

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors("write", key), self._written(data) as temporary:
            _make_folder(path.parent)
            temporary.replace(path)
            _sync(path.parent)

    def _path(self, key: str) -> Path:
        return self._folder / _checked(key)

    @contextlib.contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A file with the data, on disk, beside where it is to go; gone at the end."""
        folder = self._folder / _TEMPORARY
        _make_folder(folder)
        self._sweep(folder)
        path = folder / secrets.token_hex(16)
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _sweep(self, folder: Path) -> None:
        if self._swept:
            return
        self._swept = True
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if path.stat().st_mtime < time.time() - _STALE:
                    path.unlink()

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise ConfigError(f"cannot {action} {key!r} in {self.url}: {error.strerror}; give this user access to the folder") from error
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise ConfigError(f"cannot {action} {key!r} in {self.url}: part of the key names both a file and a folder") from error
        except OSError as error:
            raise StageError(f"cannot {action} {key!r} in {self.url}: {error.strerror}; look at the disk, then try again") from error


class S3Store:
    """A prefix of an S3 bucket. See `Store`. Credentials come from the environment, as for every AWS tool."""

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError(f"a store must be a folder or s3://bucket/prefix, got {_shown(url)}")
        self._bucket = parts.netloc
        self._prefix = parts.path.strip("/")
        if self._prefix:
            self._prefix = _checked(self._prefix) + "/"
        self._endpoint = endpoint
        self._client_made: Any = None
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def _client(self) -> Any:
        if self._client_made is None:  # an open store costs nothing before its first request
            self._client_made = s3_client(self._endpoint)
        return self._client_made

    def _name(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + _checked(key)}

    def get(self, key: str) -> bytes:
        return b"".join(self.iter_bytes(key))

    def iter_bytes(self, key: str) -> Iterator[bytes]:
        name = self._name(key)
        with self._errors("read", key):
            body = self._client.get_object(**name)["Body"]
            with contextlib.closing(body):
                yield from body.iter_chunks(CHUNK)

    def md5(self, key: str) -> str:
        return _md5(self.iter_bytes(key))

    def exists(self, key: str) -> bool:
        name = self._name(key)
        try:
            with self._errors("look for", key):
                self._client.head_object(**name)
        except StoreKeyError:
            return False
        return True

    def list(self, prefix: str = "") -> "list[str]":
        return [item.key for item in self.stored(prefix)]

    def stored(self, prefix: str = "") -> Sequence[Stored]:
        start = self._prefix + _checked_prefix(prefix)
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start)
            found = [
                Stored(item["Key"].removeprefix(self._prefix), item["Size"], item["LastModified"].timestamp())
                for page in pages
                for item in page.get("Contents", ())
            ]
        return sorted(found, key=lambda item: item.key.encode())

    def delete(self, key: str) -> None:
        name = self._name(key)
        with contextlib.suppress(StoreKeyError), self._errors("delete", key):
            self._client.delete_object(**name)

    def create(self, key: str, data: bytes) -> None:
        from botocore.exceptions import ClientError

        name = self._name(key)
        repeated = False
        for attempt in range(_CONFLICT_TRIES):
            with self._errors("create", key):
                try:
                    self._client.put_object(**name, Body=data, IfNoneMatch="*")
                    return
                except ClientError as error:
                    status, code, again = _answer(error)
                    repeated = repeated or again
                    if status == 412:
                        break
                    if status != 409 or code not in ("ConditionalRequestConflict", "OperationAborted"):
                        raise
                    repeated = True
            # Another create of the key is in progress and may yet fail: S3 asks to try again.
            time.sleep(random.uniform(0.5, 1.0) * 0.05 * 2**attempt)
        else:
            raise StageError(f"create of {key!r} in {self.url} met another one in progress {_CONFLICT_TRIES} times; try again")
        # The object exists. After a repeated request it may be this one's own, whose first answer was lost on the way.
        if repeated and self.get(key) == data:
            return
        raise ConflictError(f"{key!r} exists already in {self.url}; read it and decide again")

    def put(self, key: str, data: bytes) -> None:
        name = self._name(key)
        with self._errors("write", key):
            self._client.put_object(**name, Body=data)

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            self._fail(error, action, key)
        except (BotoCoreError, HTTPError) as error:
            where = f"{self.url} at {_shown(self._endpoint)}" if self._endpoint else self.url
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if "redential" in type(error).__name__ else "is the storage reachable?"
            raise StageError(f"cannot {action} {key!r} in {where}: {without_password(str(error))}; {hint}") from error

    def _fail(self, error: Any, action: str, key: str) -> NoReturn:
        status, code, _ = _answer(error)
        what = f"cannot {action} {key!r} in {self.url}: {code} ({status})"
        if code == "NoSuchBucket":
            raise ConfigError(f"{what}; create the bucket {self._bucket!r} or correct the store's address") from error
        if status == 404:
            raise StoreKeyError(f"no object {key!r} in {self.url}") from error
        if code == "RequestTimeTooSkewed":
            raise ConfigError(f"{what}; this machine's clock is off by more than the storage takes: set it, then run again") from error
        if status in (401, 403) or code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
            raise ConfigError(
                f"{what}; these credentials need s3:GetObject, s3:PutObject and s3:ListBucket on {self._bucket!r} (without the last, "
                "S3 answers so for an object that is merely missing)"
            ) from error
        if status in (301, 307, 400, 405, 501) and code != "RequestTimeout":
            message = error.response["Error"].get("Message", "")
            raise ConfigError(
                f"{what}: {message}; is AWS_REGION that of the bucket, and the endpoint an S3 service with conditional writes?"
            ) from error
        raise StageError(f"{what}; the storage failed, try again") from error


def _answer(error: Any) -> tuple[int, str, bool]:
    """HTTP status and S3's code of a ClientError, and whether botocore had repeated the request."""
    metadata = error.response.get("ResponseMetadata", {})
    code = str(error.response.get("Error", {}).get("Code", ""))
    return int(metadata.get("HTTPStatusCode", 0)), code, metadata.get("RetryAttempts", 0) > 0


def _checked(key: str) -> str:
    """The key. Raises ConfigError if it is not a plain relative path."""
    segments = key.split("/")
    if _BAD_KEY.search(key) or not {"", ".", ".."}.isdisjoint(segments) or segments[0] == _TEMPORARY:
        raise ConfigError(f"a store's key must be a relative path without empty, '.' or '..' parts and control characters, got {key!r}")
    return key


def _checked_prefix(prefix: str) -> str:
    if prefix:
        _checked(prefix.removesuffix("/"))
    return prefix


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error  # a listing that leaves out what it may not read would look complete


def _md5(pieces: Iterator[bytes]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _shown(address: str | None) -> str:
    return repr(address and without_password(address))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it; each is on disk before anything is written to it."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)
