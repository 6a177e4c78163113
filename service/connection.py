"""uvicorn's connection, and the two things about it that the short path wants to know and ASGI does not tell.

ASGI sends the head and the body of an answer as two messages, and uvicorn writes each at once: two system calls, two
packets, and a client that is woken twice. A `Wire` holds the head back until the body is there. It also knows how many
requests are being answered, so that a request that is alone need not wait for company, and whether its client has left.

The application finds its `Wire` in the scope's extensions; without one (another server) it does without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from typing import Any, final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import BadRequest
from service.protocol.json import error_body

EXTENSION = "evalmode.wire"

PART_BYTES = 1024 * 1024
"""As much of a body is kept for the application before the client is told to wait."""


@final
class Wire:
    """A transport whose writes can be held back and sent together; everything else is the transport's own."""

    def __init__(self, transport: asyncio.Transport, requests: Sized) -> None:
        self._transport = transport
        self._requests = requests
        self._held: list[bytes] | None = None

    @property
    def alone(self) -> bool:
        """No other request has begun and is not yet answered, on any connection."""
        return len(self._requests) <= 1

    def cork(self) -> None:
        """From here on, hold what is written."""
        self._held = []

    def uncork(self) -> None:
        """Send what was held, in one system call."""
        held, self._held = self._held, None
        if held and not self._transport.is_closing():
            self._transport.writelines(held)

    def write(self, data: bytes) -> None:
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def close(self) -> None:
        self.uncork()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@final
class Connection(HttpToolsProtocol):
    """A connection that hands its `Wire` to the application."""

    def connection_made(self, transport: Any) -> None:
        self._extensions = {EXTENSION: Wire(transport, self.tasks)}
        super().connection_made(self._extensions[EXTENSION])  # type: ignore[arg-type]  # it is one but for its class

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is answered as every error is."""
        body = error_body(BadRequest(f"the request is not valid HTTP/1.1: {msg.rstrip('.')}"))
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
        )
        self.transport.write(head % len(body) + b"\r\n" + body)
        self.transport.close()

    def on_body(self, body: bytes) -> None:
        """Wake the application for a whole body or a large part of it, and not for each packet of an image."""
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) >= PART_BYTES:
            self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions  # type: ignore[typeddict-item]  # any server may add its own
