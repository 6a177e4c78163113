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
from service.printed import announcement, say
from service.settings import Settings
from service.watching import Watcher


def serve_alone(path: Path, settings: Settings, listening: socket.socket) -> None:
    """Load what is at `path` and serve it.

    Raises:
        WrongCall: there is nothing to serve at `path`.
        Refused: the device cannot be had, or no model was admitted.
    """
    watcher = Watcher(path, every_s=settings.reload_s)
    repository = loaded(path, settings)
    said = announcement(repository, *listening.getsockname()[:2], workers=1)
    for signum in (signal.SIGINT, signal.SIGTERM):
        # uvicorn drains, then raises the signal once more for the handler that was there before its own: exit 0
        signal.signal(signum, lambda *_: None)
    crew = Alone(repository)
    app = create_app(repository, settings, crew)
    watching: list[asyncio.Task[None]] = []

    def begin() -> None:
        watching.append(asyncio.create_task(watcher.run(crew.load)))
        say(said)

    server = Server(
        app,
        begin,
        shutdown_delay_s=settings.shutdown_delay_s,
        max_connections=settings.max_connections,
    )
    server.run(sockets=[listening])
