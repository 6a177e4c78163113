"""How long a client may take to read, by bytes that go and a clock that is told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import cast

import pytest

from service.bodies import RATE_BYTES_S, Bodies
from service.unread import HURRIED_BYTES_S, HURRIED_S, UNREAD_S, Unread

WRITTEN_BYTES = 20_000_000


class Waiting:
    """A transport of which only what waits is known."""

    def __init__(self, its_socket: socket.socket) -> None:
        self.bytes = WRITTEN_BYTES
        self._socket = its_socket

    def get_write_buffer_size(self) -> int:
        return max(0, self.bytes)

    def get_extra_info(self, name: str) -> socket.socket:
        return self._socket


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    here, there = socket.socketpair()
    with here, there:
        yield Waiting(here)


def late_after_s(waiting: Waiting, *, read_bytes_s: float, every_s: float, hurry: bool) -> float | None:
    """When it was late; None if it read all."""
    bodies = Bodies(max_bytes=10, body_limit_bytes=0)
    unread = Unread(bodies, cast(asyncio.Transport, waiting), None, 0.0)
    unread.count(0.0)
    assert bodies.held_bytes == WRITTEN_BYTES
    now_s = 0.0
    while waiting.bytes > 0:
        if unread.is_late(now_s, hurry=hurry):
            return now_s
        now_s += every_s
        waiting.bytes -= int(read_bytes_s * every_s)
    unread.rest(now_s)
    assert bodies.held_bytes == 0
    return None


@pytest.mark.parametrize("every_s", [0.05, 1.0], ids=["at the end", "once a second"])
@pytest.mark.parametrize(
    ("read_bytes_s", "hurry", "late_s"),
    [
        (0, False, UNREAD_S),
        (0, True, HURRIED_S),
        (RATE_BYTES_S / 2, False, 2 * UNREAD_S),
        (RATE_BYTES_S * 1.1, False, None),
        (HURRIED_BYTES_S / 2, True, HURRIED_S),
        (HURRIED_BYTES_S * 1.2, True, None),
        (10**6, True, None),
    ],
)
def test_whoever_reads_at_the_rate_stays(
    waiting: Waiting, every_s: float, read_bytes_s: float, hurry: bool, late_s: float | None
) -> None:
    """However often it is looked at."""
    found_s = late_after_s(waiting, read_bytes_s=read_bytes_s, every_s=every_s, hurry=hurry)
    assert found_s == (None if late_s is None else pytest.approx(late_s, abs=2.1))
