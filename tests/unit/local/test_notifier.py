"""The notifier of plugins/, against a real HTTP server."""

import importlib.util
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

PLUGIN = Path(__file__).parents[3] / "plugins" / "retune_notifier.py"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if "AIRFLOW_HOME" not in os.environ:  # Airflow writes its configuration there when it is imported
            patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
        spec = importlib.util.spec_from_file_location("retune_notifier", PLUGIN)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def inbox():
    received: list[tuple[str, dict]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            received.append((self.headers["Content-Type"], json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", received=received)
    server.shutdown()
    thread.join()
    server.server_close()


def failure(error: BaseException | None = None, map_index: int = -1) -> dict:
    task = SimpleNamespace(dag_id="retrain_p", task_id="tune", run_id="r1", try_number=3, map_index=map_index, log_url="http://airflow/log")
    return {"task_instance": task, "run_id": "r1", "exception": error}


def test_a_failure_is_posted_as_json(plugin, inbox, monkeypatch):
    monkeypatch.setenv("RETUNE_NOTIFY_URL", inbox.url)
    plugin.RetuneNotifier()(failure(ValueError("no rows"), map_index=2))
    assert inbox.received == [
        (
            "application/json",
            {"dag": "retrain_p", "run": "r1", "task": "tune[2]", "try": 3, "url": "http://airflow/log", "error": "ValueError: no rows"},
        )
    ]


def test_nothing_is_posted_without_an_address(plugin, inbox, monkeypatch):
    monkeypatch.delenv("RETUNE_NOTIFY_URL", raising=False)
    plugin.RetuneNotifier()(failure(ValueError("no rows")))
    assert inbox.received == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/", "not an address", "file:///etc/passwd", "BROKEN"])
def test_an_address_that_does_not_take_it_is_logged_and_raises_nothing(plugin, inbox, monkeypatch, address):
    monkeypatch.setenv("RETUNE_NOTIFY_URL", address.replace("BROKEN", f"{inbox.url}/broken"))
    warned: list[str] = []
    notifier = plugin.RetuneNotifier()
    monkeypatch.setattr(
        type(notifier), "log", SimpleNamespace(error=lambda *_: None, warning=lambda text, *args: warned.append(text % args))
    )
    notifier.notify(failure(ValueError("no rows")))
    assert len(warned) == 1
    assert "did not take the message" in warned[0]


def test_secrets_are_cut_out(plugin, inbox, monkeypatch):
    monkeypatch.setenv("RETUNE_NOTIFY_URL", inbox.url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    plugin.RetuneNotifier()(failure(OSError("signed with wJalrXUtnFEMI at postgresql://me:hunter2@db/airflow")))  # pragma: allowlist secret
    assert inbox.received[0][1]["error"] == "OSError: signed with *** at postgresql://***@db/airflow"


def test_a_killed_task_has_no_exception_to_tell(plugin):
    assert plugin.message_of(failure())["error"].startswith("ended without an exception")
