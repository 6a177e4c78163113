"""The memory that bodies take on their way has an end: requests while they are read, answers until they are read.

Whoever sends half a body is waited for as long as it keeps to a rate (connection.py), and so is who reads slowly. So
ten thousand connections could hold ten thousand bodies, and as many answers.

Rule 1: what came is counted, and not what was declared: who declares much and sends little keeps nobody out.
Rule 2: whoever holds a part of a body says how many bytes it holds now; and none when the body is handed to the
        predictions, is refused, or the client is gone. Predictions hold a large one until it is parsed.
Rule 3: a body that is whole when it is first looked at is not counted: it is handed over before anybody else is read.
Rule 4: two bodies of the largest size have room, whatever the limit: a packed one beside what it unpacks to. So nobody
        who keeps to the limit of one body is told for ever to come again.
Rule 5: requests and answers have room of their own, or requests that fill it would wait for answers that find none.
Rule 6: a large answer has room before it is computed, or it is not. How large it will be is a guess, so a quarter of
        the room is asked for at most. One that is there is given, and counted, whatever it takes. Who takes room and
        reads little is let go of while others need it (unread.py).
"""

from __future__ import annotations

from typing import final

from service.errors import ServerFull

RATE_BYTES_S = 16 * 1024
"""At which they have to come, and to be read, beyond the time that each has."""


@final
class Bodies:
    """All requests that are being read in this process, or all answers that are not read. Belongs to one event loop."""

    __slots__ = ("called", "held_bytes", "max_bytes", "turned_away")

    def __init__(self, *, max_bytes: int, body_limit_bytes: int, called: str = "requests") -> None:
        self.called = called
        self.max_bytes = max(max_bytes, 2 * body_limit_bytes)
        self.held_bytes = 0
        self.turned_away = False
        """Somebody was, for want of room, since it was last looked after who takes it."""


@final
class Held:
    """What one holder has of them."""

    __slots__ = ("_bodies", "count_bytes")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.count_bytes = 0

    def hold(self, count_bytes: int) -> None:
        """So many bytes from now on.

        Raises:
            ServerFull: there is no room for more; what was held is held still.
        """
        bodies = self._bodies
        more_bytes = count_bytes - self.count_bytes
        if more_bytes > 0 and bodies.held_bytes + more_bytes > bodies.max_bytes:
            bodies.turned_away = True
            raise ServerFull(called=bodies.called, held_bytes=bodies.held_bytes, max_bytes=bodies.max_bytes)
        self.hold_anyhow(count_bytes)

    def hold_anyhow(self, count_bytes: int) -> None:
        """So many bytes from now on, whether there is room or not."""
        self._bodies.held_bytes += count_bytes - self.count_bytes
        self.count_bytes = count_bytes
