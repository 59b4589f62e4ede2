"""Ports."""

import socket

from retune.local.ports import choose, is_free


def listener(address: str = "127.0.0.1") -> socket.socket:
    server = socket.socket()
    server.bind((address, 0))
    server.listen()
    return server


def test_a_port_with_a_listener_is_taken_on_loopback_or_all_interfaces():
    for address in ("127.0.0.1", "0.0.0.0"):
        with listener(address) as server:
            port = server.getsockname()[1]
            assert not is_free(port)
        assert is_free(port)


def test_the_first_free_preferred_port_is_chosen():
    with listener() as server, listener() as other:
        taken = server.getsockname()[1]
        free = other.getsockname()[1]
        other.close()
        assert choose([taken, free]) == free


def test_another_port_is_found_when_all_preferred_ones_are_taken():
    with listener() as server:
        taken = server.getsockname()[1]
        port = choose([taken], taken={taken})
    assert port != taken
    assert is_free(port)


def test_a_port_that_was_just_given_out_is_not_given_out_again():
    first = choose([])
    assert choose([first], taken={first}) != first
