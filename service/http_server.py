"""uvicorn, as it serves here: quiet while nothing happens, and fair to connections that come while much happens.

Rule 1: an idle process sleeps.
Rule 2: in a turn of the loop, as many connections are taken as there are. If it were a few, then of a thousand that
        come at once the last would wait while the first are answered again and again. Only where several processes take
        from one socket does each take few, lest the first to wake have them all for as long as they stay open; and then
        the more, the more it has already, so that a thousand take some twenty turns and not some hundreds.
Rule 3: nothing that was accepted is lost when the process ends. After SIGTERM it is not ready, but answers all that
        comes for a while, until those who send it have noticed; each answer closes its connection. Then nobody is let
        in any more, what is there is answered, and the process ends. What is being admitted is given up at the signal.
        Ctrl-C goes without the while, also during it; a second SIGTERM changes nothing, since systemd sends one to each
        process and the supervisor another to each worker.
        It ends also if the engine never comes back: a thread cannot be stopped, but it can be left behind.
Rule 4: silence keeps nobody out: where all places are taken, who is idle goes, and first who would go first anyhow.
Rule 5: over TLS, who does not complete the handshake in time, or speaks something else, is let go of, and nobody waits.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from types import FrameType
from typing import Any, cast, final

import uvicorn

from service import logs
from service.asgi import Application
from service.connection import Connection
from service.handshake import speak_tls
from service.listening import let_nobody_in
from service.memory import give_back
from service.threads import wait_for_threads
from service.tls import Tls

TICK_S = 1.0
"""How often the date header and late clients are looked after; uvicorn's own tenth of a second keeps an idle process
from sleeping."""

LISTEN_BACKLOG = 2048  # uvicorn's own default

TAKES_AT_ONCE = 1024
SHARED_TAKES_AT_ONCE = 4
"""Where other processes take from the same socket: few, so that those share what comes at one moment."""

_MORE_WITH = 4
"""One more is taken at once for each so many that are open."""

DRAIN_LIMIT_S = 30.0
"""So long after nobody is let in any more, who waits is answered 503, and what is computed is not waited for."""

THREADS_LIMIT_S = 1.0
"""Threads have so long to end, however long the answers took."""

LEFT_BEHIND = 1
"""The exit code of a process that ends while a thread of it still computes."""

CONNECTING_LIMIT_S = 1.0
"""Who is in a TLS handshake then has so long to come to its end."""

DRAIN_TICK_S = 0.05

FULL_PAUSE_S = 0.1
_ROOM_OF = 64
"""When all places are taken, one in so many is made free of those that are idle."""

EXHAUSTED_PAUSE_S = 1.0
"""Without a free file descriptor a connection is left waiting for so long, as asyncio's own servers do."""


_log = logging.getLogger(__name__)


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
        timeout_graceful_shutdown=1,  # after what `Server.shutdown` waits
    )


@final
class Server(uvicorn.Server):
    """Says when it listens, so that what is printed then can be used at once."""

    def __init__(
        self,
        app: Application,
        when_listening: Callable[[], None],
        *,
        shutdown_delay_s: float = 0.0,
        max_connections: int = sys.maxsize,
        takes_at_once: int = TAKES_AT_ONCE,
        when_closing: Callable[[], Awaitable[None]] | None = None,
        tls: Tls | None = None,
    ) -> None:
        """
        Args:
            shutdown_delay_s: after SIGTERM, how long it is not ready and answers all the same.
            max_connections: while so many are open, others wait to be taken, until those that are idle make room.
            takes_at_once: so many connections are taken in a turn of the loop, or a quarter of those that are open.
            when_closing: has nobody let in any more, if no other process goes on with the socket; None: there is none.
            tls: None for plain HTTP.
        """
        super().__init__(config(app))
        self._app = app
        self._when_listening = when_listening
        self._shutdown_delay_s = shutdown_delay_s
        self._max_connections = max_connections
        self._takes_at_once = takes_at_once
        self._when_closing = when_closing
        self._failed: list[Callable[[], None]] = []
        """Of what is looked after: what has failed already."""
        self._signalled = asyncio.Event()
        self._terminated = self._interrupted = False
        """By a signal; known from the moment that it came, and not when the loop has time for it."""
        self._tls = tls
        self._cut = 0
        """Connections whose clients did not read."""
        self._connecting: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = ThreadPoolExecutor(thread_name_prefix="thread")
        """Where versions are admitted; what else takes long has threads of its own (threads.py)."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        (self._listening,) = sockets
        await super().startup([])
        if not self.started:  # the application did not start
            return
        self._listening.listen(LISTEN_BACKLOG)
        self._listening.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(self._threads)
        self._loop.add_reader(self._listening, self._take)
        await self.on_tick(0)  # the date header
        gc.collect()
        give_back()
        gc.freeze()  # what was made until now stays: the collector need not look at it again
        self._when_listening()

    async def main_loop(self) -> None:
        while not self.should_exit:
            await self._signal_within(TICK_S)

    async def _until_it_is_noticed(self) -> None:
        """Not ready from now on, and after SIGTERM still answering for a while."""
        self._app.readiness.end()
        delay_s = self._shutdown_delay_s if self._terminated else 0.0
        _log.info("asked to end: not ready from now on, and nobody is let in any more in %g s", delay_s)
        loop = asyncio.get_running_loop()
        end_s = loop.time() + delay_s
        while not self._interrupted and (left_s := end_s - loop.time()) > 0:
            await self._signal_within(min(left_s, TICK_S))

    async def _signal_within(self, limit_s: float) -> None:
        """Wait for a signal, or look after everything."""
        try:
            await asyncio.wait_for(self._signalled.wait(), limit_s)
        except TimeoutError:
            await self.on_tick(0)
            self._look_after()
        else:
            self._signalled.clear()

    def _look_after(self) -> None:
        """Clients that are late, and files that have changed; what fails ends neither the rest nor the process."""
        for look in (self._let_late_go, self._app.predictions.drop_late, self._app.access.look_again, self._read_again):
            try:
                look()
            except Exception:  # whatever it is, clients are looked after all the same
                if look not in self._failed:
                    self._failed.append(look)
                    _log.exception("what is looked after once a second failed; it is tried again, and not said again")

    def _let_late_go(self) -> None:
        cut, failed = 0, None
        for connection in self._connections:
            try:
                cut += connection.close_if_late()
            except Exception as error:  # the others are let go of all the same
                connection.cut()
                failed = error
        self._app.answers.turned_away = False
        if cut:
            self._cut += cut
            _log.warning("%d connections were cut: their clients did not read what was answered", cut)
        if failed is not None:
            raise failed

    def _read_again(self) -> None:
        if self._tls is not None:
            self._tls.look_again()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._terminated |= sig == signal.SIGTERM
        self._interrupted |= sig == signal.SIGINT
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._signalled.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # not in `main_loop`, which uvicorn leaves out if the signal comes as soon as somebody knows the address
        await self._until_it_is_noticed()
        loop = asyncio.get_running_loop()
        if self._when_closing is None:
            let_nobody_in(self._listening)
        else:
            await self._when_closing()
        await asyncio.sleep(DRAIN_TICK_S)  # who was being let in is in
        loop.remove_reader(self._listening)
        self._take(LISTEN_BACKLOG + 1)  # who came before the end, as many as can wait
        self._listening.close()
        if self._connecting:
            await asyncio.wait(self._connecting, timeout=CONNECTING_LIMIT_S)
        await asyncio.sleep(DRAIN_TICK_S)  # what has arrived is read before its connection is taken for an idle one
        end_s, cut_before = loop.time() + DRAIN_LIMIT_S, self._cut
        while self._connections_told() and not self.force_exit and loop.time() < end_s:
            await asyncio.sleep(DRAIN_TICK_S)
            self._look_after()
        if left := len(self._connections):
            _log.warning("%d connections are cut: they were not answered in time, or did not read it in time", left)
        else:
            _log.info("%s were answered", "all who read" if self._cut > cut_before else "all")
        for connection in self._connections:
            connection.give_up()
        await asyncio.sleep(DRAIN_TICK_S)
        for connection in self._connections:
            connection.cut()
        hurries, self.force_exit = self.force_exit, False  # uvicorn would cancel what the application does at its end
        await super().shutdown()
        if not await self._threads_end(0.0 if hurries else end_s):
            _log.error("a model is still being computed or admitted; the process ends without waiting for it")
            logs.flush()
            os._exit(LEFT_BEHIND)  # Python would wait for its threads

    async def _threads_end(self, end_s: float) -> bool:
        """Whether they do in time; they are given nothing more to do."""
        loop = asyncio.get_running_loop()
        least_s = loop.time() + THREADS_LIMIT_S
        waiting = threading.Thread(target=self._end_threads, daemon=True)
        waiting.start()
        while waiting.is_alive() and loop.time() < max(least_s, end_s):  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_TICK_S)
        return not waiting.is_alive()

    def _end_threads(self) -> None:
        self._threads.shutdown()
        wait_for_threads()

    def _connections_told(self) -> list[Connection]:
        """Of the end, also those whose TLS handshake comes to its own only now."""
        connections = self._connections
        for connection in connections:
            connection.shutdown()
        return connections

    @property
    def _connections(self) -> list[Connection]:
        return cast("list[Connection]", [*self.server_state.connections])

    def _take(self, most: int = 0) -> None:
        """
        Args:
            most: so many connections; 0: as many as are taken in a turn.
        """
        for turn in range(most or max(self._takes_at_once, len(self.server_state.connections) // _MORE_WITH)):
            if len(self.server_state.connections) + len(self._connecting) >= self._max_connections:
                self._pause(FULL_PAUSE_S)
                if turn == 0:  # somebody waits
                    self._make_room()
                return
            try:
                taken, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # another was quicker, or it left
                return
            except OSError:
                self._pause(EXHAUSTED_PAUSE_S)
                return
            taken.setblocking(False)
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.ensure_future(self._connect(taken))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _make_room(self) -> None:
        """Of the connections that are idle, those go that would go first anyhow: a few at once, for they are looked for
        among all."""
        idle = [(until_s, one) for one in self._connections if (until_s := one.idle_until_s) < math.inf]
        few = max(1, len(self.server_state.connections) // _ROOM_OF)
        for _, connection in heapq.nsmallest(few, idle, key=itemgetter(0)):
            connection.give_place()

    async def _connect(self, taken: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if self._tls is None:
            await loop.connect_accepted_socket(self._connection, taken)
            return
        try:
            await speak_tls(taken, self._tls.context, self._connection)
        except OSError as error:  # it does not speak TLS, or not as we do, or it left
            _log.debug("a TLS handshake failed: %s", error)

    def _pause(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listening)
        loop.call_later(pause_s, self._look_again)

    def _look_again(self) -> None:
        if self._listening.fileno() >= 0:  # it is closed when the process ends
            asyncio.get_running_loop().add_reader(self._listening, self._take)

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, self._app)
