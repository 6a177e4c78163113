"""Busy polling: the next request of a lone caller is looked for, for a moment, before the process sleeps.

To sleep and to be woken again costs as much CPU as the moment, in a virtual machine more, and the caller waits for it.
A caller on the same machine that sends one request after another is back before that. Linux does the same below sockets
(SO_BUSY_POLL in socket(7)), where a network card has to take part.

Rule 1: only after an answer to whom the answer before went too, and only as long as `MOMENT_S`: whoever sends nothing
        costs nothing, and among several somebody always comes.
Rule 2: a caller that was not back in time is not looked for after its next `PASSED_OVER` answers, so that one that
        takes longer, or that this here keeps from running, costs next to nothing.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import final

MOMENT_S = 0.0001
PASSED_OVER = 16


@final
class BusyPolling:
    """Of one event loop."""

    def __init__(self) -> None:
        self._caller = 0
        """The `id` of who was answered last."""
        self._looks = False
        """The event loop turns without sleeping."""
        self._until_s = 0.0
        """On the clock of `perf_counter`; 0: what was looked for is here."""
        self._passed_over = 0

    def answered(self, caller: object, loop: asyncio.AbstractEventLoop) -> None:
        if self._caller != id(caller):
            self._caller, self._passed_over = id(caller), 0
            return
        if self._passed_over:
            self._passed_over -= 1
            return
        self._until_s = perf_counter() + MOMENT_S
        if not self._looks:
            self._looks = True
            loop.call_soon(self._look, loop)

    def received(self) -> None:
        """Something came."""
        self._until_s = 0.0

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        if perf_counter() < self._until_s:
            loop.call_soon(self._look, loop)
            return
        self._looks = False
        if self._until_s:
            self._passed_over = PASSED_OVER
