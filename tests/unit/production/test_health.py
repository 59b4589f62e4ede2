"""Health checks against a server that really answers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from retune.production.health import main, takes_messages

REPORT = {
    "metadatabase": {"status": "healthy"},
    "scheduler": {"status": "unhealthy", "latest_scheduler_heartbeat": "2026-01-01T00:00:00+00:00"},
    "triggerer": {"status": None, "latest_triggerer_heartbeat": None},
}


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()
        self.wfile.write(json.dumps(REPORT).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["/health"], ""),
        (["/health", "metadatabase"], ""),
        (["/health", "scheduler"], "scheduler is unhealthy"),
        (["/health", "triggerer"], "triggerer is not in the report"),
        (["/health", "dag_processor"], "dag_processor is not in the report"),
        (["/other"], "HTTP 503"),
    ],
)
def test_a_component_is_well_or_the_reason_is_said(
    server: str, capsys: pytest.CaptureFixture[str], arguments: list[str], wrong: str
) -> None:
    code = main(server + arguments[0], *arguments[1:])
    assert (code, bool(capsys.readouterr().err)) == (bool(wrong), bool(wrong))


def test_the_reason_is_said(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(server + "/health", "scheduler") == 1
    assert capsys.readouterr().err == "scheduler is unhealthy\n"


def test_a_server_that_is_away_is_not_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("http://127.0.0.1:9/health") == 1
    assert "refused" in capsys.readouterr().err


def test_a_worker_without_its_broker_is_not_well() -> None:
    assert "no broker" in str(takes_messages("gpu", "amqp://127.0.0.1:9//"))
