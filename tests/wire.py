"""An application on a real socket of the loopback, and clients that choose each byte and each packet."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import re
import select
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, cast, final

import numpy as np
import pytest
import uvloop
from numpy.typing import NDArray

from service.asgi import Application
from service.connection import Connection
from service.http_server import Server
from service.large_body import LargeBody
from tests.fakes import FakeRuntime

T = TypeVar("T")

Loop = Literal["asyncio", "uvloop"]

_LOOPS: dict[Loop, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}

LIMIT_S = 20.0
"""What takes so long does not come."""


def message(
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    *,
    method: str = "POST",
    version: str = "1.1",
    chunks: Sequence[int] | None = None,
) -> bytes:
    """A request as it stands on the wire.

    Args:
        chunks: the lengths of the first pieces of a chunked body; None: its length is declared.
    """
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    lines = [f"{method} {path} HTTP/{version}", "host: service", *[f"{name}: {value}" for name, value in pairs]]
    if chunks is not None:
        lines.append("transfer-encoding: chunked")
        ends = [0, *np.cumsum(chunks), len(body)]
        pieces = [piece for start, end in itertools.pairwise(ends) if (piece := body[start:end])]
        body = b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]) + b"0\r\n\r\n"
    elif body or method == "POST":
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def __getitem__(self, name: str) -> str:
        (value,) = [value for other, value in self.headers if other == name]
        return value

    def get(self, name: str) -> str | None:
        return dict(self.headers).get(name)

    @property
    def said(self) -> Any:
        return json.loads(self.body)

    @property
    def without_chance(self) -> Answer:
        """The same, without the date, the times that it took and an id that was made."""
        blanks = {"date": ".*", "server-timing": "[0-9.]+", "x-request-id": "[0-9a-f]{12}-[0-9a-f]+"}
        headers = tuple((name, re.sub(blanks.get(name, "(?!)"), "_", value)) for name, value in self.headers)
        return Answer(status=self.status, headers=headers, body=self.body)


@final
class Client:
    """One connection, byte by byte."""

    def __init__(self, served: Served, *, receive_buffer_bytes: int | None = None) -> None:
        self._served = served
        self.socket = socket.socket()
        self.socket.settimeout(LIMIT_S)
        if receive_buffer_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.socket.connect(served.address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name: tuple[str, int] = self.socket.getsockname()
        self._file = self.socket.makefile("rb")
        self._sent_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def send(self, content: bytes) -> None:
        self.socket.sendall(content)
        self._sent_bytes += len(content)

    def send_apart(self, *packets: bytes) -> None:
        """Each when the server has read what was sent before it, so that it is read by itself; and the last is read."""
        for packet in packets:
            self.send(packet)
            self._served.wait_until_read(self.name, self._sent_bytes)

    def answer(self, *, head_only: bool = False) -> Answer:
        """The next one.

        Args:
            head_only: no body follows, whatever its length is said to be.

        Raises:
            EOFError: the server has closed the connection.
        """
        line = self._file.readline()
        if not line:
            raise EOFError
        _, status, _ = line.split(b" ", 2)
        headers = http.client.parse_headers(self._file).items()
        size = 0 if head_only else int(dict(headers).get("content-length", 0))
        body = self._file.read(size)
        assert len(body) == size, "the connection ended within an answer"
        return Answer(status=int(status), headers=tuple(headers), body=body)

    def ask(self, content: bytes) -> Answer:
        self.send(content)
        return self.answer()

    @property
    def hears_nothing(self) -> bool:
        """Nothing came that was not taken yet; asked where the server has done what it will do."""
        return not select.select([self.socket], [], [], 0)[0]

    def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        return self._file.read()

    def leave(self, *, abruptly: bool = False) -> None:
        if abruptly:  # the server reads a reset in place of an end
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._file.close()
        self.socket.close()


@final
class Clock:
    """An event loop for connections to look at; its time can be put forward."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.ahead_s = 0.0

    def time(self) -> float:
        return self._loop.time() + self.ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


@final
class Served:
    """A server that runs in a thread; see `serving`."""

    def __init__(self, app: Application, address: tuple[str, int]) -> None:
        self.app = app
        self.address = address
        self.by_asgi: list[str] = []
        """The method and the path of each request that went that way."""
        self.in_place_bytes = 0
        """Of bodies, what was read straight into its place."""
        self.clock: Clock
        self.server: Server
        self.ended: Future[None]
        """Done when the server is."""
        self._reading = threading.Condition()
        self._read: Counter[Any] = Counter()

    def connect(self, *, receive_buffer_bytes: int | None = None) -> Client:
        """Returns when the server has it."""
        client = Client(self, receive_buffer_bytes=receive_buffer_bytes)
        self.until(lambda: any(connection.client == client.name for connection in self._connections()))
        return client

    def inside(self, act: Callable[[], T]) -> T:
        """Do something on the event loop of the server."""

        async def acting() -> T:
            return act()

        loop: Any = self.clock
        return asyncio.run_coroutine_threadsafe(acting(), loop).result(LIMIT_S)

    def until(self, true: Callable[[], bool]) -> None:
        """Looks in each turn of the event loop."""

        async def looking() -> None:
            while not true():  # noqa: ASYNC110  # what is looked at has no event
                await asyncio.sleep(0.0005)

        loop: Any = self.clock
        asyncio.run_coroutine_threadsafe(looking(), loop).result(LIMIT_S)

    def until_connections(self, count: int) -> None:
        self.until(lambda: len(self._connections()) == count)

    @property
    def connections(self) -> int:
        return self.inside(lambda: len(self._connections()))

    @property
    def unsent_bytes_now(self) -> int:
        """Of answers, what the system did not take yet. For the event loop to ask."""
        return sum(one.transport.get_write_buffer_size() for one in self._connections())

    @property
    def unsent_bytes(self) -> int:
        """The same, for others to ask."""
        return self.inside(lambda: self.unsent_bytes_now)

    def pass_s(self, seconds: float) -> None:
        """Let so much time pass for the connections, then look after late clients."""

        def look() -> None:
            self.clock.ahead_s += seconds
            for connection in [*self._connections()]:
                connection.close_if_late()

        self.inside(look)

    def begin_shutdown(self) -> None:
        """As a signal does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def wait_until_read(self, name: tuple[str, int], count_bytes: int) -> None:
        with self._reading:
            assert self._reading.wait_for(lambda: self._read[name] >= count_bytes, LIMIT_S), "the server does not read"

    def note_of(self, name: tuple[str, int]) -> int:
        """How many bytes of a client were read."""
        with self._reading:
            return self._read[name]

    def note_read(self, connection: Connection, count_bytes: int) -> None:
        if connection.server_state is self.server.server_state:
            with self._reading:
                self._read[connection.client] += count_bytes
                self._reading.notify_all()

    def _connections(self) -> set[Connection]:
        return cast("set[Connection]", self.server.server_state.connections)


@contextmanager
def serving(
    app: Application,
    *,
    loop: Loop = "asyncio",
    send_buffer_bytes: int | None = None,
    shutdown_delay_s: float = 0.0,
) -> Iterator[Served]:
    """Serve it while this lasts, in a thread, where uvicorn leaves the signals alone.

    Args:
        send_buffer_bytes: of what was sent and not read, the most that the system keeps for a connection.
    """
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    if send_buffer_bytes is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    served = Served(app, listening.getsockname())
    listens = threading.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=_LOOPS[loop]) as runner:
            served.clock = Clock(runner.get_loop())
            served.server = Server(app, listens.set, shutdown_delay_s=shutdown_delay_s)
            runner.run(served.server.serve(sockets=[listening]))

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(max_workers=1) as threads:
        _spy_on(served, patch)
        served.ended = threads.submit(run)
        served.ended.add_done_callback(lambda _: listens.set())  # whatever became of it
        listens.wait()
        try:
            yield served
        finally:
            if not served.ended.done():
                served.begin_shutdown()
        served.ended.result(LIMIT_S)
        assert app.bodies.held_bytes == 0


def _spy_on(served: Served, patch: pytest.MonkeyPatch) -> None:
    """Learn which way requests go and what was read, and give connections the clock that can be put forward."""
    call, data_received, buffer_updated = Application.__call__, Connection.data_received, LargeBody.buffer_updated
    connection_of = Server._connection

    async def noted_call(app: Application, scope: Any, receive: Any, send: Any) -> None:
        if app is served.app and scope["type"] == "http":
            served.by_asgi.append(f"{scope['method']} {scope['path']}")
        await call(app, scope, receive, send)

    def noted_data_received(connection: Connection, data: bytes) -> None:
        data_received(connection, data)
        served.note_read(connection, len(data))

    def noted_buffer_updated(body: LargeBody, nbytes: int) -> None:
        buffer_updated(body, nbytes)
        served.in_place_bytes += nbytes
        served.note_read(cast(Connection, body._connection), nbytes)

    def clocked_connection(server: Server) -> Connection:
        connection = connection_of(server)
        if server is served.server:
            connection.loop = cast(asyncio.AbstractEventLoop, served.clock)
        return connection

    patch.setattr(Application, "__call__", noted_call)
    patch.setattr(Connection, "data_received", noted_data_received)
    patch.setattr(LargeBody, "buffer_updated", noted_buffer_updated)
    patch.setattr(Server, "_connection", clocked_connection)


@final
class Held:
    """A fake runtime that gives no answer until it is let go; can be used again after `renew`."""

    inputs = FakeRuntime.inputs
    outputs = FakeRuntime.outputs
    provider = FakeRuntime.provider
    threads = FakeRuntime.threads

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.fake = FakeRuntime()
        self.let_go = threading.Event()

    def wait_until_it_runs(self) -> None:
        assert self.fake.started.wait(LIMIT_S), "nothing is computed"

    def stop(self) -> None:
        pass

    def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        outputs = self.fake.run(tensors)
        assert self.let_go.wait(LIMIT_S)
        return outputs
