"""Models are loaded and served in this process; nothing else is started."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

from service.app import create_app
from service.crew import Alone
from service.http_server import Server
from service.loading import loaded
from service.printed import announcement
from service.settings import Settings
from service.stdout import say
from service.tls import tls_of
from service.watching import Watcher


def serve_alone(path: Path, settings: Settings, listening: socket.socket) -> None:
    """Load what is at `path` and serve it.

    Raises:
        WrongCall: there is nothing to serve at `path`.
        Refused: the device cannot be had, or no model was admitted.
    """
    watcher = Watcher(path, every_s=settings.reload_s, called=settings.name)
    repository = loaded(path, settings)
    host, port = listening.getsockname()[:2]
    said = announcement(repository, host, port, settings)
    crew = Alone(repository, watcher.reading)
    watching: list[asyncio.Task[None]] = []

    def begin() -> None:
        watching.append(asyncio.create_task(watcher.run(crew.load)))
        say(said)

    server = Server(
        create_app(repository, settings, crew),
        begin,
        shutdown_delay_s=settings.shutdown_delay_s,
        max_connections=settings.max_connections,
        tls=tls_of(settings),
    )
    for signum in (signal.SIGINT, signal.SIGTERM):
        # also before uvicorn has its own; it raises the signal once more for this one when it has drained: exit 0
        signal.signal(signum, server.handle_exit)
    server.run(sockets=[listening])
