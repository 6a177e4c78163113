"""The real server on a real socket, in a thread of the test."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from uvicorn.loops.auto import auto_loop_factory

from service.asgi import Application
from service.http_server import Server
from service.tls import Tls

LIMIT_S = 20


@dataclass(frozen=True, slots=True)
class At:
    """Where it listens."""

    host: str
    port: int
    connections: set[Any]
    """Those that are open."""
    end: Callable[[], None]
    """As by SIGTERM."""

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=LIMIT_S)

    def exchange(self, request: bytes) -> bytes:
        """All that comes back on a connection of its own, which the server has to close."""
        with self.connect() as connection:
            connection.sendall(request)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
            return answer


@contextmanager
def served(
    app: Application,
    *,
    tls: Tls | None = None,
    max_connections: int = sys.maxsize,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Iterator[At]:
    listens = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(app, listens.set, max_connections=max_connections, tls=tls)

        def serve() -> None:
            with asyncio.Runner(loop_factory=loop_factory or auto_loop_factory()) as runner:
                runner.run(server.serve(sockets=[listening]))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert listens.wait(LIMIT_S)
            host, port = listening.getsockname()[:2]
            yield At(host, port, server.server_state.connections, lambda: server.handle_exit(signal.SIGTERM, None))
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(LIMIT_S)
            assert not thread.is_alive()
