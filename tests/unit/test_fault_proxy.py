"""The proxy that stands for a failing S3: each fault is what it says, for as many requests as it is told."""

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from fault_proxy import Fault, FaultProxy

CONTENT = b"0123456789" * 100


@pytest.fixture
def stored() -> dict[str, bytes]:
    return {"/object": CONTENT}


@pytest.fixture
def proxy(stored: dict[str, bytes]) -> Iterator[FaultProxy]:
    """In front of a server that keeps what is put."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(stored[self.path])))
            self.send_header("ETag", "kept")
            self.end_headers()
            self.wfile.write(stored[self.path])

        def do_PUT(self) -> None:
            stored[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with FaultProxy(f"http://127.0.0.1:{server.server_address[1]}") as proxy:
        yield proxy
    server.shutdown()
    server.server_close()


def ask(proxy: FaultProxy, method: str = "GET", path: str = "/object", body: bytes | None = None) -> tuple[int, str | None, bytes]:
    connection = http.client.HTTPConnection(str(urlsplit(proxy.endpoint).netloc), timeout=10)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.getheader("ETag"), answer.read()
    finally:
        connection.close()


def test_without_a_fault_requests_and_answers_pass_whole(proxy: FaultProxy, stored: dict[str, bytes]) -> None:
    assert ask(proxy) == (200, "kept", CONTENT)
    assert ask(proxy, "PUT", "/new?x=1", b"new")[0] == 200
    assert stored["/new?x=1"] == b"new"


def test_a_fault_meets_as_many_requests_as_it_is_told_of_its_method_and_path(proxy: FaultProxy, stored: dict[str, bytes]) -> None:
    fault = Fault("503", "PUT", "/new", count=2, skip=1)
    with proxy.doing(fault):
        assert [ask(proxy, "PUT", "/new", b"x")[0] for _ in range(4)] == [200, 503, 503, 200]
        assert (ask(proxy)[0], ask(proxy, "PUT", "/other", b"")[0]) == (200, 200)
    assert fault.met == 2


def test_an_upload_that_is_reset_never_reaches_the_server(proxy: FaultProxy, stored: dict[str, bytes]) -> None:
    with proxy.doing(Fault("reset", "PUT", "/new")), pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(proxy, "PUT", "/new", CONTENT)
    assert "/new" not in stored


def test_an_upload_whose_answer_is_lost_has_reached_it(proxy: FaultProxy, stored: dict[str, bytes]) -> None:
    with proxy.doing(Fault("lost answer", "PUT", "/new")), pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(proxy, "PUT", "/new", CONTENT)
    assert stored["/new"] == CONTENT


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_half_of_an_object_under_its_whole_length_is_an_error_for_the_client(proxy: FaultProxy, kind: str) -> None:
    with proxy.doing(Fault(kind, "GET", "/object")), pytest.raises((ConnectionError, http.client.IncompleteRead)):  # type: ignore[arg-type]
        ask(proxy)


def test_half_of_an_object_under_a_fitting_length_is_none(proxy: FaultProxy) -> None:
    with proxy.doing(Fault("short", "GET", "/object")):
        assert ask(proxy) == (200, "kept", CONTENT[:500])
    assert ask(proxy)[2] == CONTENT
