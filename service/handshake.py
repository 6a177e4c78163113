"""TLS on a connection that was taken, begun in two steps: first what carries it, then TLS.

In one step nobody would know what carries it, and TLS itself says that nothing waits to be sent, however much does.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Protocol, cast, final

HANDSHAKE_LIMIT_S = 10.0
"""Whoever connects and does not speak TLS in this time is let go of."""

GOODBYE_LIMIT_S = 5.0
"""A client that does not say that it has seen the end is not waited for longer."""


class Carried(Protocol):
    """`connection.Connection`."""

    def connection_made_over(self, carrier: asyncio.Transport, transport: asyncio.Transport) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...


async def speak_tls(taken: socket.socket, context: ssl.SSLContext, connection: Callable[[], Carried]) -> None:
    """Make a connection when both sides agree.

    Raises:
        OSError: they do not, or the client left.
    """
    loop = asyncio.get_running_loop()
    early, late = _Kept(), _Kept()
    carrier, _ = await loop.connect_accepted_socket(lambda: early, taken)
    if carrier.is_closing():
        raise ConnectionAbortedError
    handshake = loop.create_task(
        loop.start_tls(
            carrier,
            late,
            context,
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_LIMIT_S,
            ssl_shutdown_timeout=GOODBYE_LIMIT_S,
        )
    )
    await asyncio.sleep(0)  # now it has taken over, and begins in the next turn of the loop, before anything is read
    loop.call_soon(_feed, carrier.get_protocol(), b"".join(early.came))
    transport = await handshake
    assert transport is not None
    made = connection()
    transport.set_protocol(cast(asyncio.BaseProtocol, made))
    made.connection_made_over(carrier, transport)
    if late.came:
        made.data_received(b"".join(late.came))
    if late.lost:
        made.connection_lost(late.lost[0])


@final
class _Kept(asyncio.Protocol):
    """What comes, and whether the connection ends, while nobody is there for it."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self.lost: list[Exception | None] = []

    def data_received(self, data: bytes) -> None:
        self.came.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


def _feed(protocol: asyncio.BaseProtocol, data: bytes) -> None:
    """As a transport does."""
    reader = cast(asyncio.BufferedProtocol, protocol)
    while data:
        room = memoryview(reader.get_buffer(len(data)))
        taken = min(len(room), len(data))
        room[:taken] = data[:taken]
        reader.buffer_updated(taken)
        data = data[taken:]
