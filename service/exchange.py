"""A prediction's request while it is being read, and whether it is answered.

uvicorn keeps a `RequestResponseCycle` for each request; for those that a connection answers itself, this is in its
place and looks like one as far as uvicorn looks.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar, final

from service.headers import Headers
from service.large_body import LARGE_BODY_BYTES, place_for
from service.prediction import Route, declared_json_bytes
from service.protocol import Body


@final
class Exchange:
    """A prediction's request and whether it is answered, in the place of uvicorn's `RequestResponseCycle`."""

    __slots__ = (
        "body_bytes",
        "chunks",
        "disconnected",
        "headers",
        "keep_alive",
        "left_bytes",
        "more_body",
        "place",
        "response_complete",
        "route",
    )

    message_event: ClassVar[asyncio.Event] = asyncio.Event()
    """uvicorn sets it when a client leaves; nobody waits for it."""

    def __init__(self, route: Route, headers: Headers, body_bytes: int, *, keep_alive: bool) -> None:
        self.route = route
        self.headers = headers
        self.body_bytes = body_bytes
        self.left_bytes = body_bytes
        """Of the body, not yet read."""
        self.chunks: list[bytes] = []
        """The body, as it came."""
        self.place: memoryview | None = None
        """The body in its place, if it is large."""
        if body_bytes >= LARGE_BODY_BYTES:
            self.place = place_for(body_bytes, declared_json_bytes(headers) or 0)
        self.keep_alive = keep_alive
        self.more_body = True
        self.disconnected = False
        self.response_complete = False

    def take(self, chunk: bytes) -> None:
        """More of the body."""
        if self.place is None:
            self.chunks.append(chunk)
        else:
            room = self.room()
            room[: len(chunk)] = chunk
        self.left_bytes -= len(chunk)

    def room(self) -> memoryview:
        """What is left to be filled of its place."""
        assert self.place is not None
        return self.place[len(self.place) - self.left_bytes :]

    def give_body(self) -> Body:
        """The whole body, which is not kept: a connection may stay for long after its answer."""
        chunks, place, self.chunks, self.place = self.chunks, self.place, [], None
        if place is not None:
            return place
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
