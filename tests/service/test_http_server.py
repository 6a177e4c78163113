"""The server of one process: who is let in, and that nobody is forgotten at the end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service import http_server
from service.app import create_app
from service.asgi import Application
from service.http_server import SHARED_TAKES_AT_ONCE, TAKES_AT_ONCE, Server
from service.repository import Repository
from service.runtime import place
from service.settings import Settings

HALF = b"GET /v2/health/live HTTP/1.1\r\n"
ALIVE = HALF + b"host: x\r\n\r\n"


def in_a_thread(scenario: Callable[[], Awaitable[None]]) -> None:
    """Where uvicorn leaves the signals alone."""

    async def limited() -> None:
        await asyncio.wait_for(scenario(), timeout=20)

    with ThreadPoolExecutor(max_workers=1) as threads:
        threads.submit(asyncio.run, limited()).result()


class Exhausted(socket.socket):
    """There is no file descriptor left, the first time."""

    tried = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.tried += 1
        if self.tried == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def empty() -> Application:
    """Connections are enough here."""
    return create_app(Repository((), path=Path(), placement=place("cpu"), settings=Settings()), Settings())


@asynccontextmanager
async def sharing(*sockets: socket.socket) -> AsyncIterator[list[Server]]:
    servers, ends = [], []
    for listening in sockets:
        listens = asyncio.Event()
        servers.append(Server(empty(), listens.set, takes_at_once=SHARED_TAKES_AT_ONCE))
        ends.append(asyncio.create_task(servers[-1].serve(sockets=[listening])))
        await listens.wait()
    yield servers
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*ends)


async def next_turn() -> None:
    """Of the event loop."""
    await asyncio.sleep(0)


def taken(server: Server) -> int:
    return len(server.server_state.connections)


def test_nobody_takes_all_connections() -> None:
    """Twenty come at once, and two share them."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            async with sharing(listening.dup(), listening.dup()) as servers:
                clients = [socket.create_connection(listening.getsockname()) for _ in range(20)]
                while sum(map(taken, servers)) < 20:
                    await next_turn()
                assert min(map(taken, servers)) >= 5
                for client in clients:
                    client.close()

    in_a_thread(scenario)


@pytest.mark.parametrize(("takes_at_once", "most_turns"), [(TAKES_AT_ONCE, 8), (SHARED_TAKES_AT_ONCE, 60)])
def test_who_comes_with_many_does_not_wait_for_as_many_turns(takes_at_once: int, most_turns: int) -> None:
    """Of four hundred that come at once: in each turn, those that were taken before are answered again."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
            listens = asyncio.Event()
            server = Server(empty(), listens.set, takes_at_once=takes_at_once)
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            await listens.wait()
            clients = [socket.create_connection(listening.getsockname()) for _ in range(400)]
            turns = 0
            while taken(server) < 400:
                await next_turn()
                turns += 1
            assert turns < most_turns
            for client in clients:
                client.close()
            server.should_exit = True
            await serving

    in_a_thread(scenario)


def test_who_came_before_the_end_is_answered() -> None:
    """A hundred connections are made, and then the signal comes: those that wait to be taken are not forgotten."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listens = asyncio.Event()
            server = Server(empty(), listens.set, takes_at_once=SHARED_TAKES_AT_ONCE)
            serving = asyncio.create_task(server.serve(sockets=[listening.dup()]))
            await listens.wait()
            clients = [socket.create_connection(listening.getsockname()) for _ in range(100)]
            for client in clients:
                client.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")
            server.handle_exit(signal.SIGTERM, None)
            listening.close()
            await serving
            assert [client.recv(1000)[:12] for client in clients] == [b"HTTP/1.1 200"] * 100
            for client in clients:
                client.close()

    in_a_thread(scenario)


def test_a_request_that_has_arrived_at_the_end_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a connection that was idle until then: it was sent, and is not read yet, when the process goes to its end."""
    request = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listens = asyncio.Event()
            server = Server(empty(), listens.set)

            async def until_it_is_asked_again() -> None:
                client.sendall(request)
                answer = b""
                while not answer.endswith(b"}"):  # head and body may come apart
                    answer += await asyncio.to_thread(client.recv, 1000)
                assert answer.startswith(b"HTTP/1.1 200")
                client.sendall(request)

            monkeypatch.setattr(server, "main_loop", until_it_is_asked_again)
            with socket.create_connection(listening.getsockname()) as client:
                await server.serve(sockets=[listening.dup()])
                assert client.recv(1000).startswith(b"HTTP/1.1 200")

    in_a_thread(scenario)


def test_without_file_descriptors_a_connection_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is it lost, nor is it tried again and again meanwhile."""
    monkeypatch.setattr(http_server, "EXHAUSTED_PAUSE_S", 0.05)

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as open_socket:
            listening = Exhausted(fileno=open_socket.detach())
            async with sharing(listening) as (server,):
                with socket.create_connection(listening.getsockname()):
                    while not taken(server):
                        await next_turn()
                    assert listening.tried == 3  # refused, taken, and nobody else is there

    in_a_thread(scenario)


def test_no_more_connections_than_allowed_are_taken() -> None:
    """The third waits until one of the two before it has gone, for these are busy."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listens = asyncio.Event()
            server = Server(empty(), listens.set, max_connections=2)
            serving = asyncio.create_task(server.serve(sockets=[listening.dup()]))
            await listens.wait()
            clients = [socket.create_connection(listening.getsockname()) for _ in range(3)]
            for client in clients[:2]:
                client.sendall(HALF)
            await asyncio.sleep(0.3)
            assert taken(server) == 2
            clients[0].close()
            clients[2].sendall(ALIVE)
            answer = await asyncio.to_thread(clients[2].recv, 1000)
            assert answer.startswith(b"HTTP/1.1 200")
            for client in clients:
                client.close()
            server.should_exit = True
            await serving

    in_a_thread(scenario)


def test_silence_keeps_nobody_out() -> None:
    """All places are taken by those who say nothing: the first of them goes, and who is busy stays."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listens = asyncio.Event()
            server = Server(empty(), listens.set, max_connections=3)
            serving = asyncio.create_task(server.serve(sockets=[listening.dup()]))
            await listens.wait()
            busy, first, second = (socket.create_connection(listening.getsockname()) for _ in range(3))
            busy.sendall(HALF)
            while taken(server) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            with socket.create_connection(listening.getsockname(), timeout=10) as one_more:
                one_more.sendall(ALIVE)
                assert (await asyncio.to_thread(one_more.recv, 1000)).startswith(b"HTTP/1.1 200")
            assert await asyncio.to_thread(first.recv, 1) == b""
            for client in (busy, second):
                client.sendall(ALIVE.removeprefix(HALF) if client is busy else ALIVE)
                assert (await asyncio.to_thread(client.recv, 1000)).startswith(b"HTTP/1.1 200")
            for client in (busy, first, second):
                client.close()
            server.should_exit = True
            await serving

    in_a_thread(scenario)


def test_a_signal_that_comes_as_soon_as_the_address_is_known_waits_all_the_same() -> None:
    """Who starts the service may end it at once: the while in which others notice is theirs nevertheless."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def ended_at_once() -> None:
                server.handle_exit(signal.SIGTERM, None)

            app = empty()
            began_s = time.monotonic()
            server = Server(app, ended_at_once, shutdown_delay_s=1)
            serving = asyncio.create_task(server.serve(sockets=[listening.dup()]))
            while not (app.readiness.ending or serving.done()):
                await next_turn()
            assert not serving.done()
            with socket.create_connection(listening.getsockname(), timeout=10) as client:
                client.sendall(ALIVE)
                assert (await asyncio.to_thread(client.recv, 1000)).startswith(b"HTTP/1.1 200")
            await serving
            assert time.monotonic() - began_s >= 1

    in_a_thread(scenario)
