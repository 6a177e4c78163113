"""A large body is read straight into one piece of memory; its binary tensors are read from there by the model.

uvicorn's way copies each packet three times before the body is whole, which for an image takes as long as its small
network. The memory is not touched before something is written to it: declaring much and sending little costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import final

import numpy as np

LARGE_BODY_BYTES = 64 * 1024
"""From here on it pays to read in a way of its own."""

_ALIGNMENT = 16
"""Of what a memory allocator hands out, and enough for every datatype."""


def place_for(size: int, json_bytes: int) -> memoryview:
    """Room for a body of so many bytes; what follows its JSON begins where processors like numbers to begin."""
    shift = -json_bytes % _ALIGNMENT
    return np.empty(shift + size, dtype=np.uint8).data[shift:]


_NO_ROOM = memoryview(b"")
"""In place of the last, empty part of a body, which would keep it for as long as a transport keeps this protocol."""


@final
class LargeBody(asyncio.BufferedProtocol):
    """Reads for a connection until a body is whole; all else that happens meanwhile is the connection's own."""

    def __init__(self, connection: asyncio.Protocol, room: memoryview, read: Callable[[int], bool]) -> None:
        """
        Args:
            room: what is left to be filled, not empty.
            read: is told how many bytes came, and says whether more is wanted.
        """
        self._connection = connection
        self._room = room
        self._read = read

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        self._room = self._room[nbytes:] or _NO_ROOM
        if not self._read(nbytes):
            self._room = _NO_ROOM  # transports hold on to who read last

    def eof_received(self) -> bool | None:
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
