"""JSON over HTTP with the standard library: starts at once, where a client library costs half a second of imports."""

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Refused", "Unreachable", "answers", "request"]


class Refused(Exception):
    """The server answered with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status
        self.text = text


class Unreachable(Exception):
    """Nothing answered."""


def request(url: str, method: str = "GET", body: Any = None, token: str | None = None, timeout: float = 10) -> Any:
    """The decoded JSON answer; text that is no JSON as it is. Raises Refused or Unreachable."""
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    made = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - callers pass http(s) addresses of the stack
    # A proxy of the environment cannot reach this machine's loopback.
    local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    try:
        with opener.open(made, timeout=timeout) as answer:
            text = answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        raise Refused(error.code, error.read().decode("utf-8", "replace")[:2000]) from None
    except (OSError, ValueError) as error:
        raise Unreachable(f"{url}: {getattr(error, 'reason', error)}") from None
    try:
        return json.loads(text)
    except ValueError:
        return text


def answers(url: str, timeout: float = 3) -> bool:
    """Whether the address answers with success."""
    try:
        request(url, timeout=timeout)
    except (Refused, Unreachable):
        return False
    return True
