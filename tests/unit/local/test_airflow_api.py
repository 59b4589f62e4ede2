"""The REST client, against a server that answers as Airflow 3.3 does."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from retune.errors import ConfigError, RetuneError
from retune.local.airflow_api import Airflow


class Api(BaseHTTPRequestHandler):
    tokens = 0
    triggered: list[dict]
    expired = False
    asked = 0
    import_errors: list[dict]

    def log_message(self, *args):
        pass

    def answer(self, status: int, value) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/auth/token":
            if body["password"] != "right":  # pragma: allowlist secret
                return self.answer(401, {"detail": "Invalid credentials"})
            type(self).tokens += 1
            return self.answer(201, {"access_token": f"token-{type(self).tokens}"})
        if self.path == "/api/v2/dags/d/dagRuns":
            if body["dag_run_id"] in [run["dag_run_id"] for run in self.triggered]:
                return self.answer(409, {"detail": "exists"})
            self.triggered.append(body)
            return self.answer(200, body)
        return self.answer(422, {"detail": self.path})

    def do_GET(self):
        if self.expired and self.headers["Authorization"] == "Bearer token-1":
            return self.answer(401, {"detail": "expired"})
        if self.path == "/api/v2/dags/d":
            return self.answer(200, {"dag_id": "d"})
        if self.path == "/api/v2/dags/d/tasks/late":
            type(self).asked += 1
            return self.answer(200, {"task_id": "late"}) if self.asked > 1 else self.answer(404, {"detail": "not found"})
        if self.path.startswith("/api/v2/importErrors"):
            return self.answer(200, {"import_errors": self.import_errors})
        if self.path.startswith("/api/v2/dags/d/dagRuns/r%2B1/taskInstances"):
            base = {"end_date": "2026-01-01T00:00:09Z", "duration": 4.0, "state": "success", "try_number": 1, "rendered_map_index": None}
            return self.answer(
                200,
                {
                    "task_instances": [
                        base | {"task_id": "last", "map_index": -1, "start_date": None, "end_date": None, "duration": None, "state": None},
                        base | {"task_id": "tune", "map_index": 1, "start_date": "2026-01-01T00:00:05Z", "rendered_map_index": "slow"},
                        base | {"task_id": "tune", "map_index": 0, "start_date": "2026-01-01T00:00:04Z"},
                    ]
                },
            )
        return self.answer(404, {"detail": "not found"})


@pytest.fixture
def api():
    handler = type("Handler", (Api,), {"tokens": 0, "triggered": [], "import_errors": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_is_triggered_once_however_often_it_is_asked_for(api):
    handler, url = api
    airflow = Airflow(url, "admin", "right")
    for _ in range(2):
        airflow.trigger("d", "r1", {"force": True})
    assert handler.triggered == [{"dag_run_id": "r1", "logical_date": None, "conf": {"force": True}, "note": None}]
    assert handler.tokens == 1


def test_an_expired_token_is_replaced(api):
    handler, url = api
    airflow = Airflow(url, "admin", "right")
    airflow.wait_for_dag("d")
    handler.expired = True
    airflow.wait_for_dag("d")
    assert handler.tokens == 2


def test_tasks_come_in_the_order_of_their_start_with_the_names_of_mapped_ones(api):
    tasks = Airflow(api[1], "admin", "right").tasks("d", "r+1")
    assert [(t.label, t.state, t.seconds) for t in tasks] == [
        ("tune [0]", "success", 4.0),
        ("tune [slow]", "success", 4.0),
        ("last", "waiting", None),
    ]


def test_a_dag_that_fails_to_import_is_reported_at_once(api):
    handler, url = api
    handler.import_errors = [{"filename": "x.py", "stack_trace": "Traceback:\n  ...\nNameError: nope\n"}]
    with pytest.raises(ConfigError, match=r"x\.py: NameError: nope"):
        Airflow(url, "admin", "right").wait_for_dag("unknown")


def test_a_task_that_a_new_prompt_file_brings_is_waited_for(api):
    handler, url = api
    Airflow(url, "admin", "right").wait_for_task("d", "late", timeout=10)
    assert handler.asked == 2
    with pytest.raises(ConfigError, match="no task 'never' in the DAG 'd'"):
        Airflow(url, "admin", "right").wait_for_task("d", "never", timeout=0)


def test_a_wrong_password_and_a_stack_that_is_down_say_what_to_do(api):
    with pytest.raises(RetuneError, match="refused the login of 'admin'"):
        Airflow(api[1], "admin", "wrong").run("d", "r")
    with pytest.raises(RetuneError, match="retune up"):
        Airflow("http://127.0.0.1:9", "admin", "right").run("d", "r")
