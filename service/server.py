"""`evalmode serve`: a socket is bound, and one process or several serve on it until a signal comes.

Rule 1: SIGTERM is answered from the start. The kernel keeps from process 1, which the service is in a container, every
    signal that it has no handler for: without one, an end that is wished for while models load would be waited for in
    vain, and come as a kill.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
from contextlib import suppress
from pathlib import Path

from service import logs
from service.access import Access
from service.errors import Refused
from service.memory import share_arenas
from service.settings import Settings
from service.tls import tls_of


def serve(path: Path, settings: Settings) -> None:
    """Serve what is at `path` until SIGINT or SIGTERM.

    Raises:
        WrongCall: there is nothing to serve at `path`, or the files of keys or certificates cannot be used.
        Refused: the port is taken, the device cannot be had, no model was admitted, or no worker can be started.
    """
    signal.signal(signal.SIGINT, lambda *_: _end(130))  # until there is something to drain
    signal.signal(signal.SIGTERM, lambda *_: _end(0))
    share_arenas()
    _allow_descriptors()
    logs.begin(settings.log_level, settings.log_format)
    Access(settings), tls_of(settings)  # what is wrong with their files is said before anything is begun
    with _listening(settings.host, settings.port) as listening:
        if settings.workers == 1:
            from service.alone import serve_alone  # the engine is loaded where models run, and nowhere else

            serve_alone(path, settings, listening)
        else:
            from service.workers.supervisor import Supervisor

            asyncio.run(Supervisor(path, settings, listening).run())


def _end(code: int) -> None:
    """At once, whatever is being imported or loaded: an exception that came out of the engine would be another one."""
    logs.flush()
    os._exit(code)


def _allow_descriptors() -> None:
    """As many as the system gives this process: many shells start with 1,024, which is not a thousand connections."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket, taken before any model is loaded: a wrong port is said at once. Nobody can connect to it until
    there is somebody to answer."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise Refused(
            f"cannot listen on '{host}': {error.strerror}; --host takes an address of this machine"
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        hint = {
            errno.EADDRINUSE: "another process has it; choose another with --port, or 0 for a free one",
            errno.EACCES: "this user may not; choose a port from 1024 on with --port",
        }.get(error.errno or 0, "--host takes an address of this machine")
        raise Refused(f"cannot listen on {host}:{port}: {error.strerror}; {hint}") from error
    return listening
