"""Store, ledger and DVC's remote on a real S3 server (see s3_server.py)."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import S3, s3_server
from test_ledger import race

from retune.errors import ConfigError, ConflictError
from retune.ledger import Ledger
from retune.store import Store, StoreKeyError, check_create, open_store

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as s3:
        yield s3


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    return s3.make_bucket(request.node.name.replace("_", "-")[:63].rstrip("-"))


@pytest.fixture
def store(s3: S3, bucket: str) -> Store:
    return open_store(f"s3://{bucket}/some/prefix", s3.endpoint)


def test_objects_are_written_once_replaced_and_read(store: Store) -> None:
    data = bytes(range(256)) * 8192
    store.create("a/ü b+c%20", data)
    with pytest.raises(ConflictError):
        store.create("a/ü b+c%20", data)
    assert store.get("a/ü b+c%20") == data
    assert store.md5("a/ü b+c%20") == hashlib.md5(data).hexdigest()
    store.put("a/ü b+c%20", b"")
    assert store.get("a/ü b+c%20") == b""
    assert (store.exists("a/ü b+c%20"), store.exists("a")) == (True, False)
    with pytest.raises(StoreKeyError):
        store.get("a")


def test_objects_are_listed_with_size_and_time_and_deleted(store: Store) -> None:
    begun = time.time()
    for key in ("a/b", "a/c"):
        store.put(key, b"12345")
    assert [(item.key, item.size) for item in store.stored("a/")] == [("a/b", 5), ("a/c", 5)]
    assert all(abs(item.modified - begun) < 60 for item in store.stored("a/"))
    for _ in range(2):
        store.delete("a/b")
    assert store.list() == ["a/c"]


def test_a_listing_of_several_pages_is_whole_and_sorted(s3: S3, bucket: str, store: Store) -> None:
    keys = [f"many/{n:04d}" for n in range(120)]  # the server answers 50 at a time
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.put(key, b""), [*keys, "many.not", "other"]))
    assert store.list("many/") == keys
    assert store.list() == sorted([*keys, "many.not", "other"])
    assert store.list("none/") == []
    assert open_store(f"s3://{bucket}", s3.endpoint).list("some/prefix/oth") == ["some/prefix/other"]


def test_a_missing_bucket_and_wrong_keys_are_configuration_errors(s3: S3, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = open_store("s3://no-such-bucket/x", s3.endpoint)
    for action in (lambda: missing.get("a"), lambda: missing.put("a", b""), lambda: missing.create("a", b""), missing.list):
        with pytest.raises(ConfigError, match="create the bucket 'no-such-bucket'"):
            action()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    denied = open_store(store.url, s3.endpoint)
    for action in (lambda: denied.get("a"), lambda: denied.create("a", b""), lambda: denied.exists("a"), denied.list):
        with pytest.raises(ConfigError, match="403"):
            action()


def test_creates_are_exclusive(store: Store) -> None:
    check_create(store)


def test_of_eight_racing_processes_exactly_one_wins_each_round(tmp_path: Path, store: Store) -> None:
    rounds = 6
    said = race(store.url, rounds, tmp_path / "start")
    ledger = Ledger(store, "raced")
    entries = ledger.entries()
    assert [entry.n for entry in entries] == list(range(rounds))
    for n in range(rounds):
        assert [f"p{i}" for i in range(8) if said[i][n] == "won"] == [entries[n].by]
    assert sum(one.count("lost") for one in said) > 0  # they did meet
    assert ledger.head() == entries[-1]
    assert ledger.verify() == rounds


def test_dvc_pushes_and_pulls(tmp_path: Path, s3: S3, bucket: str) -> None:
    def dvc(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    dvc("init", "--no-scm", "--quiet")
    dvc("config", "core.analytics", "false")
    dvc("remote", "add", "--default", "store", f"s3://{bucket}/dvc")
    dvc("remote", "modify", "store", "endpointurl", s3.endpoint)
    (tmp_path / "data").mkdir()
    contents = {"one": b"1" * 1000, "two": os.urandom(20_000_000)}  # the second goes in several parts
    for name, content in contents.items():
        (tmp_path / "data" / name).write_bytes(content)
    dvc("add", "data")
    dvc("push")
    objects = open_store(f"s3://{bucket}/dvc", s3.endpoint)
    keys = objects.list("files/md5/")
    assert len(keys) == 3  # two files and the folder's list
    for key in keys:
        assert key.removeprefix("files/md5/").replace("/", "").removesuffix(".dir") == objects.md5(key)
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / ".dvc" / "cache")
    dvc("pull")
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == contents
