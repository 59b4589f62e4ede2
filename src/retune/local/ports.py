"""Free ports on the loopback address; the ones used before are kept where they are still free, so that bookmarks hold."""

import socket
from collections.abc import Iterable

__all__ = ["LOOPBACK", "choose", "is_free"]

LOOPBACK = "127.0.0.1"


def is_free(port: int) -> bool:
    """Whether nothing listens on the port and it can be bound (a server on all interfaces counts as listening)."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        if probe.connect_ex((LOOPBACK, port)) == 0:
            return False
    with socket.socket() as server:
        # As servers do: without it a port in TIME_WAIT, just left by the stack's last run, counts as taken.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def choose(preferred: Iterable[int], taken: Iterable[int] = ()) -> int:
    """The first free port of `preferred`, else any free one; never one of `taken`."""
    taken = set(taken)
    for port in preferred:
        if port not in taken and is_free(port):
            return port
    while True:
        with socket.socket() as server:
            server.bind((LOOPBACK, 0))
            port = int(server.getsockname()[1])
        if port not in taken:
            return port
