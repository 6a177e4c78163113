"""The memory that bodies take while they are read has an end.

Whoever sends half a body is waited for as long as it keeps to a rate (connection.py), so ten thousand connections could
hold ten thousand bodies.

Rule 1: what came is counted, and not what was declared: who declares much and sends little keeps nobody out.
Rule 2: whoever holds a part of a body says how many bytes it holds now; and none when the body is handed to the
        predictions, is refused, or the client is gone. Predictions hold a large one until it is parsed.
Rule 3: a body that is whole when it is first looked at is not counted: it is handed over before anybody else is read.
Rule 4: two bodies of the largest size have room, whatever the limit: a packed one beside what it unpacks to. So nobody
        who keeps to the limit of one body is told for ever to come again.
"""

from __future__ import annotations

from typing import final

from service.errors import ServerFull


@final
class Bodies:
    """All that are being read in this process. Belongs to one event loop."""

    __slots__ = ("held_bytes", "max_bytes")

    def __init__(self, *, max_bytes: int, body_limit_bytes: int) -> None:
        self.max_bytes = max(max_bytes, 2 * body_limit_bytes)
        self.held_bytes = 0


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
            raise ServerFull(held_bytes=bodies.held_bytes)
        bodies.held_bytes += more_bytes
        self.count_bytes = count_bytes
