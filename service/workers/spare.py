"""A process ahead of need, that has imported what a worker needs, and knows no model.

Rule: it is there from the first want until it is taken; when it ends before that, there is another, with growing pauses
    where that does not help.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import final

from service.workers.pauses import STEADY_S, pause_s
from service.workers.process import Process

LEAST_PAUSE_S = 1.0
"""Nobody waits for a spare; and where all processes are told to end at once, it may end before its supervisor knows."""

_log = logging.getLogger(__name__)


@final
class Spare:
    """The one that waits for a worker to die."""

    def __init__(self, start: Callable[[], Awaitable[Process]], dismiss: Callable[[Process], Awaitable[str]]) -> None:
        """
        Args:
            dismiss: to be called for each that `start` gave and that is not taken; how it ended.
        """
        self._start = start
        self._dismiss = dismiss
        self._kept: asyncio.Task[None] | None = None
        self._started: asyncio.Future[Process] | None = None

    def want(self) -> None:
        """Have one from now on."""
        if self._kept is None or self._kept.done():
            self._kept = asyncio.create_task(self._keep())

    async def taken(self) -> Process | None:
        """It, if it lives; there is none then until somebody wants one again."""
        kept, self._kept = self._kept, None
        started, self._started = self._started, None
        if kept is not None:
            kept.cancel()
        if started is None:
            return None
        try:
            spare = await asyncio.shield(started)
        except asyncio.CancelledError:  # whoever takes it in place of this one has it
            self._started = started
            raise
        except Exception:  # it was not started, and the log says why
            return None
        if not spare.ended:
            return spare
        await self._dismiss(spare)
        return None

    async def _keep(self) -> None:
        failures = 0
        while True:
            began_s = time.monotonic()
            try:
                ended = await self._one()
            except OSError as error:  # no memory for another process, or too many of them
                ended = f"cannot be started: {error.strerror}"
            except Exception:  # what nobody foresaw must not be the end of all spares
                _log.exception("the spare could not be kept")
                ended = "is not there"
            failures = 0 if time.monotonic() - began_s > STEADY_S else failures + 1
            rest_s = max(LEAST_PAUSE_S, pause_s(failures))
            _log.warning("the spare, which replaces a worker that dies, %s; the next is begun in %.0f s", ended, rest_s)
            await asyncio.sleep(rest_s)

    async def _one(self) -> str:
        """A spare, to its end, if nobody takes it; how it ended."""
        self._started = asyncio.ensure_future(self._start())
        spare = await asyncio.shield(self._started)  # whoever takes it meanwhile has it
        await spare.wait()
        return await self._dismiss(spare)
