"""What is written on a connection and waits to be read: what it takes of the memory, and how long it may.

Rule 1: it counts with all bodies that are on their way (bodies.py), for as long as the system has not taken all of it:
        until then the process keeps it whole.
Rule 2: a client has `UNREAD_S`, and a second more for each `RATE_BYTES_S` that it reads.
Rule 3: in a hurry (others are turned away for want of room, or the process ends) whoever reads less than
        `HURRIED_BYTES_S` has to go after `HURRIED_S`.
Rule 4: TLS takes what is written and says that nothing waits, so it is asked of what carries it.
"""

from __future__ import annotations

import asyncio
import math
import sys
from contextlib import suppress
from typing import final

from service.bodies import RATE_BYTES_S, Bodies, Held

if sys.platform != "win32":
    import fcntl
    import termios

UNREAD_S = 30.0
"""How long nothing of it may be read, and the most that is given at once."""

HURRIED_S = 5.0
HURRIED_BYTES_S = 64 * 1024

LOOK_S = 0.9
"""What is read is looked at no more often."""

_RESUMED_BYTES = 48 * 1024
"""What was read at least when writing goes on: from the high mark of a transport to the low one."""


@final
class Unread:
    """Of one connection. Belongs to its event loop, on whose clock all times are."""

    __slots__ = ("_held", "_left_bytes", "_looked_s", "_slow_since_s", "_transports", "_until_s")

    def __init__(self, bodies: Bodies, transport: asyncio.Transport, carrier: asyncio.Transport | None, now_s: float):
        """
        Args:
            carrier: what carries the transport, if that is TLS.
        """
        self._held = Held(bodies)
        self._transports = (transport,) if carrier is None else (transport, carrier)
        self._left_bytes = 0
        """When it was last looked, which was then:"""
        self._looked_s = now_s
        self._until_s = now_s + UNREAD_S
        """More has to be read until then."""
        self._slow_since_s = math.inf
        """Since then there is something, and little of it is read."""

    @property
    def unsent_bytes(self) -> int:
        """That the system has not taken."""
        return sum([transport.get_write_buffer_size() for transport in self._transports])

    def count(self, now_s: float) -> None:
        """To be called when much was written, and when something may have been read."""
        if unsent_bytes := self.unsent_bytes:
            whole_bytes = unsent_bytes + self._system_bytes()
            self._held.hold_anyhow(max(self._held.count_bytes, whole_bytes))
            self._slow_since_s = min(self._slow_since_s, now_s)
        else:
            self.forget()

    def resume(self, now_s: float) -> None:
        """Next to nothing is left."""
        self._give_time(_RESUMED_BYTES, now_s)
        self.forget()

    def is_late(self, now_s: float, *, hurry: bool) -> bool:
        """Whether the client has to go; to be asked once a second or more often, while something is unsent."""
        self.count(now_s)
        if now_s - self._looked_s >= LOOK_S:
            left_bytes = self.unsent_bytes + self._system_bytes()
            read_bytes = max(0, self._left_bytes - left_bytes)
            self._left_bytes, self._looked_s = left_bytes, now_s
            self._give_time(read_bytes, now_s)
            if read_bytes >= HURRIED_BYTES_S:
                self._slow_since_s = now_s
        return now_s > self._until_s or (hurry and now_s > self._slow_since_s + HURRIED_S)

    def rest(self, now_s: float) -> None:
        """Nothing is unsent, as far as whoever looks once a second knows."""
        self._left_bytes, self._looked_s = 0, now_s
        self._until_s = now_s + UNREAD_S
        self.forget()

    def forget(self) -> None:
        """Nothing of it is here any more."""
        self._held.hold_anyhow(0)
        self._slow_since_s = math.inf

    def _system_bytes(self) -> int:
        """That the system has and the client's has not; 0 where it does not say."""
        if sys.platform == "win32":
            return 0
        with suppress(OSError, ValueError):  # the socket is closed
            socket = self._transports[-1].get_extra_info("socket")
            return int.from_bytes(fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return 0

    def _give_time(self, read_bytes: int, now_s: float) -> None:
        self._until_s = min(self._until_s + read_bytes / RATE_BYTES_S, now_s + UNREAD_S)
