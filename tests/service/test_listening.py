"""The end of listening, on real sockets."""

from __future__ import annotations

import socket
import sys

import pytest

from service.listening import let_nobody_in

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a filter of Linux")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_who_was_let_in_is_there_and_nobody_else_comes(host: str) -> None:
    """Who asks afterwards is neither let in nor told so, until the socket is closed."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        address = listening.getsockname()[:2]
        with socket.create_connection(address) as early:
            let_nobody_in(listening)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.3)
            early.sendall(b"asks")
            taken, _ = listening.accept()
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                listening.accept()
            listening.close()
            with taken:
                assert taken.recv(4) == b"asks"
                taken.sendall(b"is told")
            assert early.recv(16) == b"is told"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_all_who_have_the_socket_let_nobody_in() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(fileno=listening.dup().detach()) as same:
        let_nobody_in(same)
        same.close()
        with pytest.raises(TimeoutError):
            socket.create_connection(listening.getsockname(), timeout=0.3)
