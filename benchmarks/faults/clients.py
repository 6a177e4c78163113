"""Callers who never pause, and what they did not get.

Rule 1: a caller has one request in flight, so an end or a kill can cost it one, and a second one is a fault.
Rule 2: a request counts as accepted once its connection is made: the kernel has taken it in the name of the service.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

ANSWER_LIMIT_S = 10.0


@final
@dataclass(frozen=True, slots=True)
class Lost:
    """A request that was accepted and not answered with 200."""

    port: int
    """Of the caller's end of the connection."""
    why: str


@final
class Client(threading.Thread):
    """Asks one sample after the other, on a new connection where the last was closed, until it is refused or `end`."""

    def __init__(self, port: int, sample: dict[str, Any], *, stays: bool) -> None:
        """
        Args:
            stays: on its connection, as long as the service keeps that; else each request has one of its own.
        """
        super().__init__(daemon=True)
        self._address = ("127.0.0.1", port)
        self.stays = stays
        body = json.dumps(sample).encode()
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        self._request = (head + ("" if stays else "Connection: close\r\n") + "\r\n").encode() + body
        self._over = threading.Event()
        self.answered = 0
        self.lost: list[Lost] = []
        self.refused = False
        """Nobody listens any more."""

    def run(self) -> None:
        while not self._over.is_set():
            try:
                connection = socket.create_connection(self._address, timeout=ANSWER_LIMIT_S)
            except ConnectionError:
                self.refused = True
                return
            with connection:
                while self._asked(connection) and self.stays and not self._over.is_set():
                    pass

    def end(self) -> None:
        """After the answer that it waits for."""
        self._over.set()

    def _asked(self, connection: socket.socket) -> bool:
        """Send a request; whether another may be sent on this connection."""
        port = connection.getsockname()[1]
        answer = b""
        try:
            connection.sendall(self._request)
            while not whole(answer):
                part = connection.recv(65536)
                if not part:
                    self.lost.append(Lost(port, f"closed after {answer!r}"))
                    return False
                answer += part
        except OSError as error:
            self.lost.append(Lost(port, repr(error)))
            return False
        if not answer.startswith(b"HTTP/1.1 200 "):
            self.lost.append(Lost(port, repr(answer[:200])))
        self.answered += 1
        return b"connection: close" not in answer


def whole(answer: bytes) -> bool:
    """It has as many bytes as its head says."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return length is not None and len(body) == int(length[1])


@contextmanager
def calling(port: int, sample: dict[str, Any], *, staying: int, coming: int) -> Iterator[list[Client]]:
    """Callers at work until the block ends.

    Args:
        staying: so many that keep their connection.
        coming: so many with a connection for each request.
    """
    clients = [Client(port, sample, stays=i < staying) for i in range(staying + coming)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.end()
        for client in clients:
            client.join(timeout=2 * ANSWER_LIMIT_S)
