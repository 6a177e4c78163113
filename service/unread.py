"""What is written on a connection and waits to be read: what it takes of the memory, and how long it may.

Rule 1: it counts with all bodies that are on their way (bodies.py): what the transport has of it, and what the system
        has, which the process keeps until the rest is sent.
Rule 2: a client has `UNREAD_S`, and a second more for each `RATE_BYTES_S` that it reads.
Rule 3: while others are turned away for want of room, it has to read at `CROWDED_BYTES_S`, but for `CROWDED_S`.
"""

from __future__ import annotations

import asyncio
import math
import socket
from typing import final

from service.bodies import RATE_BYTES_S, Bodies, Held

UNREAD_S = 30.0
"""How long nothing of it may be read, and the most that is given at once."""

CROWDED_S = 5.0
CROWDED_BYTES_S = 64 * 1024

_RESUMED_BYTES = 48 * 1024
"""What was read at least when writing goes on: from the high mark of a transport to the low one."""


@final
class Unread:
    """Of one connection. Belongs to its event loop, on whose clock all times are."""

    __slots__ = ("_bodies", "_held", "_slow_since_s", "_unsent_bytes", "_until_s")

    def __init__(self, bodies: Bodies, now_s: float) -> None:
        self._bodies = bodies
        self._held = Held(bodies)
        self._unsent_bytes = 0
        """When it was last looked."""
        self._until_s = now_s + UNREAD_S
        """More has to be read until then."""
        self._slow_since_s = math.inf
        """Since then there is something, and little of it is read."""

    def pause(self, transport: asyncio.Transport, now_s: float) -> None:
        """The transport should take no more."""
        sending_bytes = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._hold(transport.get_write_buffer_size() + sending_bytes, now_s)

    def resume(self, now_s: float) -> None:
        """It takes more again."""
        self._give_time(_RESUMED_BYTES, now_s)
        self._hold(0, now_s)

    def is_late(self, unsent_bytes: int, now_s: float, *, paused: bool) -> bool:
        """Whether the client has to go; to be asked about once a second.

        Args:
            unsent_bytes: that the transport has now.
            paused: it should take no more.
        """
        read_bytes = max(0, self._unsent_bytes - unsent_bytes)
        self._unsent_bytes = unsent_bytes
        if not paused:
            self._hold(unsent_bytes, now_s)
        if not unsent_bytes:
            self._until_s = now_s + UNREAD_S
            return False
        self._give_time(read_bytes, now_s)
        if read_bytes > CROWDED_BYTES_S:
            self._slow_since_s = now_s
        crowds = self._bodies.turned_away and now_s > self._slow_since_s + CROWDED_S
        return crowds or now_s > self._until_s

    def forget(self) -> None:
        """Nobody reads it any more."""
        self._held.hold_anyhow(0)

    def _hold(self, count_bytes: int, now_s: float) -> None:
        self._held.hold_anyhow(count_bytes)
        self._slow_since_s = min(self._slow_since_s, now_s) if count_bytes else math.inf

    def _give_time(self, read_bytes: int, now_s: float) -> None:
        self._until_s = min(self._until_s + read_bytes / RATE_BYTES_S, now_s + UNREAD_S)
