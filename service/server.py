"""`evalmode serve`: models are admitted, said, and served until a signal comes."""

from __future__ import annotations

import errno
import logging
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import final

import orjson
import uvicorn

from service.app import create_app
from service.connection import Connection
from service.errors import Refused
from service.openapi import infer_example
from service.repository import Entry, Repository, find, load
from service.runtime import place
from service.settings import Settings

LISTEN_BACKLOG = 2048  # uvicorn's own default


def serve(path: Path, settings: Settings) -> None:
    """Serve what is at `path` until SIGINT or SIGTERM.

    Raises:
        WrongCall: there is nothing to serve at `path`.
        Refused: the port is taken, the device cannot be had, or no model was admitted.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    find(path)  # a wrong path is said before anything is begun
    with _listening(settings.host, settings.port) as listening:
        placement = place(settings.device, gpu_memory_limit_bytes=settings.gpu_memory_limit_bytes)
        _say(f"models run on {placement.provider} ({placement.why})")
        repository = load(path, placement, settings, tell=_tell)
        if not repository.ready:
            raise Refused(f"no model under '{path}' was admitted, so there is nothing to serve")
        config = uvicorn.Config(
            create_app(repository, settings),
            lifespan="on",
            loop="auto",
            http=Connection,
            proxy_headers=False,  # nothing here asks who the client is
            access_log=False,
            server_header=False,
            log_config=None,
            log_level="warning",
        )
        host, port = listening.getsockname()[:2]
        for signum in (signal.SIGINT, signal.SIGTERM):
            # uvicorn drains, then raises the signal once more for the handler that was there before its own: exit 0
            signal.signal(signum, lambda *_: None)
        _Server(config, announcement=_announcement(repository, host, port)).run(sockets=[listening])


@final
class _Server(uvicorn.Server):
    """Speaks when it listens, so that what it prints can be used at once."""

    def __init__(self, config: uvicorn.Config, *, announcement: str) -> None:
        super().__init__(config)
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _say(self._announcement)


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket, taken before any model is loaded: a wrong port is said at once."""
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
        listening.listen(LISTEN_BACKLOG)
    except OSError as error:
        listening.close()
        hint = {
            errno.EADDRINUSE: "another process has it; choose another with --port, or 0 for a free one",
            errno.EACCES: "this user may not; choose a port from 1024 on with --port",
        }.get(error.errno or 0, "--host takes an address of this machine")
        raise Refused(f"cannot listen on {host}:{port}: {error.strerror}; {hint}") from error
    return listening


def _tell(entry: Entry) -> None:
    if entry.live is None:
        _say(f"  {entry.name}/{entry.version}  REFUSED  {entry.reason}")
        return
    live = entry.live
    admitted = live.admitted
    golden = "; ".join(
        f"{admitted.golden_rows} golden samples replayed, {figure.name} within {figure.difference:.2g} of PyTorch "
        f"({figure.bound:.2g} allowed)"
        for figure in admitted.golden
    )
    bound = f" up to {live.batching.independence.bound:.2g}" if live.batching.independence.kind == "bounded" else ""
    _say(f"  {entry.name}/{entry.version}  ready")
    folded = sum(1 for fold in admitted.folds if fold.into)
    _say(f"    structure     {len(admitted.batchnorms)} BatchNorm layers, all frozen, {folded} of them folded")
    _say(
        f"    digest        {'as the passport says' if admitted.bundle.passport else 'no passport: a plain ONNX file'}"
    )
    _say(f"    golden        {golden or 'no golden samples: equality with PyTorch is not known'}")
    sizes = ", ".join(str(size) for size in live.batching.independence.batch_sizes)
    _say(f"    independence  {live.batching.independence.kind}{bound}, in batches of {sizes}")


def _announcement(repository: Repository, host: str, port: int) -> str:
    """Addresses, and a call that works as printed."""
    local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"http://{local}:{port}"
    return f"""
serving at    {address}
API docs      {address}/docs

Try it:

{_call(repository, address)}
"""


def _call(repository: Repository, address: str) -> str:
    sendable = [
        live for live in repository.models if all(spec.datatype != "FP16" for spec in live.admitted.signature.inputs)
    ]
    if not sendable:
        return "float16 has no JSON form in the protocol, so there is no call to print; export the network in float32"
    live = next((live for live in sendable if live.reader is not None), sendable[0])
    if live.reader is not None:
        path = "/predict" if len(repository.models) == 1 else f"/models/{live.name}/predict"
        body = orjson.dumps(live.admitted.signature.example()).decode()
    else:
        path, body = f"/v2/models/{live.name}/infer", orjson.dumps(infer_example(live)).decode()
    return f"curl {address}{path} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _say(text: str) -> None:
    print(text, flush=True, file=sys.stdout)
