"""What `init` refuses. That it makes what the other services need is shown where docker-compose.yml is executed."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from retune.errors import ConfigError
from retune.production.init import main

BUCKETS = b"<ListAllMyBucketsResult><Buckets><Bucket><Name>retune</Name></Bucket></Buckets></ListAllMyBucketsResult>"


class _TakesEveryWrite(BaseHTTPRequestHandler):
    """An S3 store that knows no conditions: each writer is told that it made the object."""

    made: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(200, BUCKETS)

    def do_HEAD(self) -> None:
        self._answer(404)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.count("/") == 1:
            self.made.append(self.path)
        self._answer(200)

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _TakesEveryWrite)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_store_that_cannot_hold_ledgers_stops_the_start_before_anything_is_made_in_a_database(endpoint: str) -> None:
    environ = {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "RETUNE_STORE": "s3://retune/store",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/artifacts",
        "AIRFLOW__LOGGING__REMOTE_BASE_LOG_FOLDER": "s3://airflow-logs/tasks",
    }
    with pytest.raises(ConfigError, match="s3://retune/store cannot hold ledgers: 8 of 8 writers made the same object"):
        main(environ)
    assert _TakesEveryWrite.made == ["/mlflow", "/airflow-logs"]
