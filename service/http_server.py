"""uvicorn, as it serves here: alone on its socket, or with other processes that take connections from the same one.

An event loop takes every connection that waits; of several processes, the first to wake then has them all, and with
connections that stay open it does all the work (measured: 64 of 64 opened at once). So where a socket is shared, each
process takes one connection and then looks after those it has, before it takes another.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, final

import uvicorn

from service.connection import Connection

TICK_S = 1.0
"""How often uvicorn looks after its date header; its own tenth of a second keeps an idle process from sleeping."""

EXHAUSTED_PAUSE_S = 1.0
"""Without a free file descriptor a connection is left waiting for so long, as asyncio's own servers do."""


def config(app: Any) -> uvicorn.Config:
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


class _QuietServer(uvicorn.Server):
    """Sleeps while nothing happens, and says when it listens, so that what is printed then can be used at once."""

    def __init__(self, app: Any, when_listening: Callable[[], None]) -> None:
        super().__init__(config(app))
        self._when_listening = when_listening
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def listens(self) -> None:
        """What was made until now stays: the garbage collector need not look at it again."""
        self._loop = asyncio.get_running_loop()
        gc.collect()
        gc.freeze()
        self._when_listening()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), TICK_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ending.set)


@final
class Server(_QuietServer):
    """Has its socket for itself."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.listens()


@final
class SharingServer(_QuietServer):
    """Takes connections one by one from a socket that other processes take from too."""

    def __init__(self, app: Any, when_listening: Callable[[], None]) -> None:
        super().__init__(app, when_listening)
        self._connecting: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        (self._listening,) = sockets
        await super().startup([])
        self._listening.setblocking(False)
        self.listens()
        asyncio.get_running_loop().add_reader(self._listening, self._take_one)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().remove_reader(self._listening)
        await super().shutdown(sockets)

    def _take_one(self) -> None:
        try:
            taken, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another process was quicker, or it left
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
            asyncio.get_running_loop().add_reader(self._listening, self._take_one)

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)
