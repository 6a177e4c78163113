"""TLS on a connection that was taken, begun in two steps: first what carries it, then TLS.

In one step nobody would know what carries it, and TLS itself says that nothing waits to be sent, however much does.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Callable
from typing import Protocol, cast, final

HANDSHAKE_LIMIT_S = 10.0
"""Whoever connects and does not speak TLS in this time is let go of."""


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
    handshake = loop.create_task(
        loop.start_tls(
            carrier,
            late,
            context,
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_LIMIT_S,
            ssl_shutdown_timeout=math.inf,  # it would count while the client reads; connection.py knows who is late
        )
    )
    await asyncio.sleep(0)  # now it has taken over, and begins in the next turn of the loop, before anything is read
    if carrier.is_closing():
        handshake.cancel()
        raise ConnectionAbortedError
    loop.call_soon(_feed, carrier, b"".join(early.came))
    transport = await handshake
    if transport is None or carrier.is_closing():
        raise ConnectionAbortedError
    made = connection()
    transport.set_protocol(cast(asyncio.BaseProtocol, made))
    made.connection_made_over(carrier, transport)
    late.hand_over(made)


@final
class _Kept(asyncio.Protocol):
    """What comes, and whether the connection ends, while nobody is there for it."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self._lost: list[Exception | None] = []
        self._to: Carried | None = None

    def hand_over(self, to: Carried) -> None:
        """And what is still on its way here."""
        self._to = to
        if self.came:
            to.data_received(b"".join(self.came))
        if self._lost:
            to.connection_lost(self._lost[0])

    def data_received(self, data: bytes) -> None:
        if self._to is None:
            self.came.append(data)
        else:
            self._to.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._to is None:
            self._lost.append(exc)
        else:
            self._to.connection_lost(exc)


def _feed(carrier: asyncio.Transport, data: bytes) -> None:
    """As it does itself."""
    reader = cast(asyncio.BufferedProtocol, carrier.get_protocol())
    while data and not carrier.is_closing():
        room = memoryview(reader.get_buffer(len(data)))
        taken = min(len(room), len(data))
        room[:taken] = data[:taken]
        reader.buffer_updated(taken)
        data = data[taken:]
