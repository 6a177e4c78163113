"""uvicorn, as it serves here: quiet while nothing happens, and fair to connections that come while much happens.

Rule 1: an idle process sleeps.
Rule 2: in a turn of the loop, several connections are taken, but not all. If it were one, then with a thousand
        connections and ten milliseconds a turn, the last would wait for ten seconds before its request is read. If it
        were all, the first of several processes on the socket to wake would have them for as long as they stay open.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, cast, final

import uvicorn

from service.asgi import Application
from service.connection import Connection

TICK_S = 1.0
"""How often the date header and late clients are looked after; uvicorn's own tenth of a second keeps an idle process
from sleeping."""

TAKES_AT_ONCE = 64
SHARED_TAKES_AT_ONCE = 4
"""Where other processes take from the same socket: few, so that those share what comes at one moment."""

EXHAUSTED_PAUSE_S = 1.0
"""Without a free file descriptor a connection is left waiting for so long, as asyncio's own servers do."""


def config(app: Application) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="on",
        loop="auto",
        http=Connection,
        ws="none",
        proxy_headers=False,  # nothing here asks who the client is
        access_log=False,
        server_header=False,
        log_config=None,
        log_level="warning",
    )


@final
class Server(uvicorn.Server):
    """Says when it listens, so that what is printed then can be used at once."""

    def __init__(
        self, app: Application, when_listening: Callable[[], None], *, takes_at_once: int = TAKES_AT_ONCE
    ) -> None:
        """
        Args:
            takes_at_once: the most connections that are taken in a turn of the loop.
        """
        super().__init__(config(app))
        self._app = app
        self._when_listening = when_listening
        self._takes_at_once = takes_at_once
        self._ending = asyncio.Event()
        self._connecting: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        (self._listening,) = sockets
        await super().startup([])
        if not self.started:  # the application did not start
            return
        self._listening.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listening, self._take)
        gc.collect()
        gc.freeze()  # what was made until now stays: the collector need not look at it again
        self._when_listening()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            for connection in cast("list[Connection]", [*self.server_state.connections]):
                connection.close_if_late()
            self._app.predictions.drop_late()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), TICK_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ending.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().remove_reader(self._listening)
        await super().shutdown(sockets)

    def _take(self) -> None:
        for _ in range(self._takes_at_once):
            try:
                taken, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another was quicker, or it left
                return
            except OSError:
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._listening)
                loop.call_later(EXHAUSTED_PAUSE_S, self._look_again)
                return
            taken.setblocking(False)
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.ensure_future(asyncio.get_running_loop().connect_accepted_socket(self._connection, taken))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _look_again(self) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(self._listening, self._take)

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, self._app)
