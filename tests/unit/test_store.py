"""Both stores: the folder on a real disk, S3 against a server in this process that answers as each test scripts it."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retune.errors import ConfigError, ConflictError, StageError
from retune.settings import Settings
from retune.store import FolderStore, S3Store, Store, StoreKeyError, check_create, open_store

SECRET = "wJalrXUtnFEMI-not-to-be-seen"  # pragma: allowlist secret

Answer = tuple[int, dict[str, str], bytes]


def refusal(status: int, code: str) -> Answer:
    return status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code><Message>said so</Message></Error>".encode()


class ScriptedS3:
    """Keeps objects; `script` may answer a request in its place: an answer, "lost" (done, but unanswered) or None (as usual)."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.script: Callable[[str, str, int], Answer | str | None] = lambda method, path, nth: None
        self.requests: list[str] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with outer.lock:
                    outer.requests.append(self.command)
                    nth = outer.requests.count(self.command)
                scripted = outer.script(self.command, self.path, nth)
                answer = scripted if isinstance(scripted, tuple) else outer.serve(self.command, self.path, self.headers, body)
                if scripted == "lost":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_DELETE = handle_one  # names that http.server asks for

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve(self, method: str, path: str, headers: Any, body: bytes) -> Answer:
        with self.lock:
            if method == "PUT":
                if headers.get("If-None-Match") == "*" and path in self.objects:
                    return refusal(412, "PreconditionFailed")
                self.objects[path] = body
                return 200, {}, b""
            if method == "DELETE":
                self.objects.pop(path, None)
                return 204, {}, b""
            if path not in self.objects:
                return refusal(404, "NoSuchKey")
            return 200, {}, self.objects[path]


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


@pytest.fixture
def s3() -> Iterator[ScriptedS3]:
    server = ScriptedS3()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    return S3Store("s3://bucket/some/prefix", request.getfixturevalue("s3").endpoint)


def test_what_is_written_is_read_back(store: Store) -> None:
    data = bytes(range(256)) * 10_000
    store.put("a/b/one", data)
    assert store.get("a/b/one") == data
    assert b"".join(store.iter_bytes("a/b/one")) == data
    assert max(map(len, store.iter_bytes("a/b/one"))) <= 1 << 20
    assert store.md5("a/b/one") == hashlib.md5(data).hexdigest()
    assert (store.exists("a/b/one"), store.exists("a/b/two")) == (True, False)


def test_put_replaces_and_create_does_not(store: Store) -> None:
    store.put("key", b"one")
    store.put("key", b"two")
    with pytest.raises(ConflictError, match="'key' exists already"):
        store.create("key", b"three")
    assert store.get("key") == b"two"
    store.create("other", b"")
    assert store.get("other") == b""


def test_what_is_deleted_is_gone_and_nobody_minds_a_second_time(store: Store) -> None:
    for key in ("a/b", "a/c"):
        store.put(key, b"1")
    for _ in range(2):
        store.delete("a/b")
    assert (store.exists("a/b"), store.exists("a/c")) == (False, True)
    store.create("a/b", b"2")


def test_a_listing_tells_size_and_time(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.put("b", b"12345")
    store.put("a/b", b"")
    os.utime(tmp_path / "store/b", (1000, 1000))
    assert [(item.key, item.size) for item in store.stored()] == [("a/b", 0), ("b", 5)]
    assert [item.modified for item in store.stored("b")] == [1000]
    assert store.stored("c") == []


def test_create_with_the_very_bytes_that_are_there_is_a_conflict(store: Store) -> None:
    store.create("key", b"same")
    with pytest.raises(ConflictError):
        store.create("key", b"same")


@pytest.mark.parametrize("read", ["get", "md5"])
def test_a_missing_object_is_named(store: Store, read: str) -> None:
    with pytest.raises(StoreKeyError, match="no object 'a/b'"):
        getattr(store, read)("a/b")


def test_exactly_one_thread_of_eight_creates(store: Store) -> None:
    def create(n: int) -> bool:
        try:
            store.create("key", str(n).encode() * 100)
        except ConflictError:
            return False
        return True

    store.exists("key")
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(create, range(8)))
    assert won.count(True) == 1
    assert store.get("key") == str(won.index(True)).encode() * 100


BAD_KEYS = ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "a\\b", "a\nb", "a\x00b", "\x7f", ".tmp", ".tmp/a", "\ud800"]


@pytest.mark.parametrize("method", ["get", "md5", "exists", "create", "put"])
def test_a_malformed_key_is_refused(store: Store, method: str) -> None:
    for key in BAD_KEYS:
        with pytest.raises(ConfigError, match="must be a relative path"):
            getattr(store, method)(key, *([b""] if method in ("create", "put") else []))


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_key_is_refused_or_stays_inside_the_folder(tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "inside"
    store = FolderStore(folder)
    try:
        path = store._path(key)
    except ConfigError:
        return
    assert folder in path.parents
    assert os.path.normpath(path) == str(path)


WITH_PASSWORD = "s3://user:word@bucket/x"  # pragma: allowlist secret


@pytest.mark.parametrize("url", ["http://bucket/x", "s3://", WITH_PASSWORD, "s3://bucket/x?y", "s3://bucket/../x"])
def test_a_malformed_address_is_refused_without_repeating_a_password(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_store(url)
    assert "word" not in str(error.value)


def test_open_store_takes_settings_an_address_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").touch()
    settings = Settings.load({"RETUNE_PROJECT": str(tmp_path), "RETUNE_STORE": "s3://b/p/", "AWS_ENDPOINT_URL": "http://own:1"})
    opened = open_store(settings)
    assert isinstance(opened, S3Store)
    assert (opened.url, opened._client.meta.endpoint_url) == ("s3://b/p", "http://own:1")
    assert open_store("s3://b").url == "s3://b"
    assert open_store(tmp_path).url == open_store(str(tmp_path)).url == str(tmp_path)
    assert isinstance(open_store(tmp_path), FolderStore)


# The folder


def test_folder_lists_sorted_by_bytes_below_a_prefix(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert store.list() == []
    keys = ["b", "a/2", "a/10", "a/é", "a/z", "a-b", "a/b/c", "ab"]
    for key in keys:
        store.put(key, b"")
    assert store.list() == ["a-b", "a/10", "a/2", "a/b/c", "a/z", "a/é", "ab", "b"]
    assert store.list("a/") == ["a/10", "a/2", "a/b/c", "a/z", "a/é"]
    assert store.list("a/b") == ["a/b/c"]
    assert store.list("a") == ["a-b", "a/10", "a/2", "a/b/c", "a/z", "a/é", "ab"]
    assert store.list("missing/") == []
    with pytest.raises(ConfigError):
        store.list("../")


def test_files_of_others_in_the_folder_are_objects_too(tmp_path: Path) -> None:
    (tmp_path / "files" / "md5").mkdir(parents=True)
    (tmp_path / "files" / "md5" / "ab").write_bytes(b"dvc's")
    assert FolderStore(tmp_path).get("files/md5/ab") == b"dvc's"
    assert FolderStore(tmp_path).list() == ["files/md5/ab"]


@pytest.mark.parametrize("method", ["put", "create"])
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    store = FolderStore(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageError, match=r"'a/b'.*No space left on device"):
        getattr(store, method)("a/b", b"x" * 1000)
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_writer_that_is_killed_leaves_no_half_object(tmp_path: Path) -> None:
    program = f"""
import pathlib
from retune.store import FolderStore
store = FolderStore(pathlib.Path({str(tmp_path)!r}))
print(flush=True)
n = 0
while True:
    store.put("same", bytes([n % 256]) * 3_000_000)
    store.create(f"new/{{n}}", bytes([n % 256]) * 3_000_000)
    n += 1
"""
    store = FolderStore(tmp_path)
    for delay in (0.05, 0.11, 0.17, 0.23):
        (tmp_path / "new").exists() and [path.unlink() for path in (tmp_path / "new").iterdir()]
        writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert writer.returncode == -signal.SIGKILL
        for key in store.list():
            data = store.get(key)
            assert (len(data), len(set(data))) == (3_000_000, 1)


def test_half_written_files_of_the_killed_are_cleared_a_day_later(tmp_path: Path) -> None:
    old, young = tmp_path / ".tmp" / "old", tmp_path / ".tmp" / "young"
    old.parent.mkdir()
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 25 * 3600))
    store = FolderStore(tmp_path)
    assert store.list() == []
    store.put("key", b"")
    assert (old.exists(), young.exists()) == (False, True)


def test_workers_of_other_users_may_read(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        FolderStore(tmp_path).create("key", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o644


def test_a_key_that_is_a_folder_elsewhere_is_named(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("a/b", b"")
    for write in (store.put, store.create):
        with pytest.raises((ConfigError, ConflictError), match="'a'"):
            write("a", b"")
        with pytest.raises(ConfigError, match=r"'a/b/c'.*both a file and a folder"):
            write("a/b/c", b"")
    for key in ("a", "a/b/c"):
        assert not store.exists(key)
        with pytest.raises(StoreKeyError):
            store.get(key)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything")
def test_denied_access_to_a_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir(mode=0)
    store = FolderStore(tmp_path)
    for action in (lambda: store.put("sub/a", b""), lambda: store.get("sub/a"), lambda: store.exists("sub/a"), lambda: store.list()):
        with pytest.raises(ConfigError, match="give this user access"):
            action()


def test_check_create_passes_a_folder_and_refuses_storage_that_looks_first_and_writes_later(tmp_path: Path) -> None:
    check_create(FolderStore(tmp_path))

    class Swiftly(FolderStore):
        def create(self, key: str, data: bytes) -> None:
            if self.exists(key):
                raise ConflictError(key)
            time.sleep(0.05)
            self.put(key, data)

    with pytest.raises(ConfigError, match="cannot hold ledgers: 8 of 8 writers"):
        check_create(Swiftly(tmp_path))


# S3 and its faults


def test_create_tries_again_after_another_one_in_progress(s3: ScriptedS3) -> None:
    s3.script = lambda method, path, nth: refusal(409, "ConditionalRequestConflict") if nth < 3 else None
    store = S3Store("s3://bucket", s3.endpoint)
    store.create("key", b"mine")
    assert s3.objects == {"/bucket/key": b"mine"}
    assert s3.requests == ["PUT"] * 3


def test_create_that_met_another_one_in_progress_and_lost_is_a_conflict(s3: ScriptedS3) -> None:
    s3.objects["/bucket/key"] = b"theirs"
    s3.script = lambda method, path, nth: refusal(409, "ConditionalRequestConflict") if (method, nth) == ("PUT", 1) else None
    with pytest.raises(ConflictError):
        S3Store("s3://bucket", s3.endpoint).create("key", b"mine")


def test_create_gives_up_when_another_one_never_ends(s3: ScriptedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    s3.script = lambda method, path, nth: refusal(409, "ConditionalRequestConflict")
    with pytest.raises(StageError, match="8 times"):
        S3Store("s3://bucket", s3.endpoint).create("key", b"mine")


def test_create_knows_its_own_object_after_a_lost_answer(s3: ScriptedS3) -> None:
    s3.script = lambda method, path, nth: "lost" if (method, nth) == ("PUT", 1) else None
    S3Store("s3://bucket", s3.endpoint).create("key", b"mine")
    assert s3.requests == ["PUT", "PUT", "GET"]
    assert s3.objects == {"/bucket/key": b"mine"}


def test_create_does_not_take_anothers_object_for_its_own_after_a_failure(s3: ScriptedS3) -> None:
    s3.objects["/bucket/key"] = b"theirs"
    s3.script = lambda method, path, nth: refusal(503, "SlowDown") if (method, nth) == ("PUT", 1) else None
    with pytest.raises(ConflictError):
        S3Store("s3://bucket", s3.endpoint).create("key", b"mine")
    assert s3.requests == ["PUT", "PUT", "GET"]


def test_a_short_outage_is_waited_out(s3: ScriptedS3) -> None:
    s3.objects["/bucket/key"] = b"data"
    s3.script = lambda method, path, nth: refusal(503, "SlowDown") if nth == 1 else None
    assert S3Store("s3://bucket", s3.endpoint).get("key") == b"data"


def test_a_body_that_breaks_off_is_not_an_object(s3: ScriptedS3) -> None:
    s3.script = lambda method, path, nth: (200, {"Content-Length": "1000", "Connection": "close"}, b"half")
    with pytest.raises(StageError, match="cannot read 'key'"):
        S3Store("s3://bucket", s3.endpoint).get("key")


@pytest.mark.parametrize(
    ("status", "code", "error", "hint"),
    [
        (500, "InternalError", StageError, "try again"),
        (503, "SlowDown", StageError, "try again"),
        (403, "AccessDenied", ConfigError, "s3:GetObject"),
        (403, "SignatureDoesNotMatch", ConfigError, "credentials"),
        (403, "RequestTimeTooSkewed", ConfigError, "clock is off"),
        (400, "ExpiredToken", ConfigError, "credentials"),
        (400, "AuthorizationHeaderMalformed", ConfigError, "AWS_REGION"),
        (501, "NotImplemented", ConfigError, "conditional writes"),
        (404, "NoSuchBucket", ConfigError, "create the bucket 'bucket'"),
    ],
)
def test_a_refusal_is_typed_and_shows_the_way_out(
    s3: ScriptedS3, status: int, code: str, error: type[Exception], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.script = lambda *_: refusal(status, code)
    store = S3Store("s3://bucket", s3.endpoint)
    for method in ("get", "md5", "create", "put", "list"):
        with pytest.raises(error, match=hint) as caught:
            getattr(store, method)("key", *([b"x"] if method in ("create", "put") else []))
        assert code in str(caught.value)
        assert SECRET not in str(caught.value)


def test_exists_does_not_take_a_refusal_for_an_absence(s3: ScriptedS3) -> None:
    s3.script = lambda *_: refusal(403, "AccessDenied")
    with pytest.raises(ConfigError, match="s3:ListBucket"):
        S3Store("s3://bucket", s3.endpoint).exists("key")


def test_an_unreachable_endpoint_is_named_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(StageError, match=rf"'http://127.0.0.1:{port}'.*reachable") as caught:
        S3Store("s3://bucket", f"http://me:{SECRET}@127.0.0.1:{port}").get("key")
    assert SECRET not in str(caught.value)


def test_missing_credentials_say_what_to_set(s3: ScriptedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StageError, match="set AWS_ACCESS_KEY_ID"):
        S3Store("s3://bucket", s3.endpoint).get("key")


def test_an_endpoint_that_is_no_address_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL_S3"):
        S3Store("s3://bucket", "no endpoint").get("key")


def test_region_is_taken_from_the_environment_else_us_east_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert S3Store("s3://bucket")._client.meta.region_name == "us-east-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    assert S3Store("s3://bucket")._client.meta.region_name == "eu-central-1"


def test_boto3_is_imported_only_when_s3_is_used() -> None:
    program = "import sys, retune.store, retune.ledger; retune.store.open_store('s3://b'); print('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
