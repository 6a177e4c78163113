"""Models are loaded and served in this process; nothing else is started."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

from service.app import create_app
from service.errors import Refused
from service.http_server import Server
from service.printed import announcement, say, tell
from service.repository import Repository, find, load
from service.runtime import Placement, place, usable_cpus
from service.settings import Settings


def serve_alone(path: Path, settings: Settings, listening: socket.socket) -> None:
    """Load what is at `path` and serve it.

    Raises:
        WrongCall: there is nothing to serve at `path`.
        Refused: the device cannot be had, or no model was admitted.
    """
    repository = loaded(path, settings)
    said = announcement(repository, *listening.getsockname()[:2], workers=1)
    for signum in (signal.SIGINT, signal.SIGTERM):
        # uvicorn drains, then raises the signal once more for the handler that was there before its own: exit 0
        signal.signal(signum, lambda *_: None)
    Server(create_app(repository, settings), lambda: say(said)).run(sockets=[listening])


def loaded(path: Path, settings: Settings) -> Repository:
    """What is at `path`, admitted and said.

    Raises:
        WrongCall, Refused: as `serve_alone`.
    """
    find(path)  # a wrong path is said before anything is begun
    placement = placed(settings)
    say(f"models run on {placement.provider} ({placement.why})")
    repository = load(path, placement, settings, tell=tell)
    if not repository.ready:
        raise Refused(f"no model under '{path}' was admitted, so there is nothing to serve")
    return repository


def placed(settings: Settings) -> Placement:
    """Where models run, with this process's share of the CPUs."""
    return place(
        settings.device,
        gpu_memory_limit_bytes=settings.gpu_memory_limit_bytes,
        cpus=max(1, usable_cpus() // settings.workers),
    )
