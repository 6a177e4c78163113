"""One end and one kill, of a service that is asked all the time, and what each of them cost."""

from __future__ import annotations

import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import psutil

from benchmarks.chaos.server import Server, serving
from benchmarks.faults.clients import Client, Lost, calling

STAYING, COMING = 8, 4
"""Callers that keep their connection, and callers with one for each request."""

LOADED_S = 0.5
"""They have asked for so long when it happens."""

DELAY_S = 0.5
"""For `--shutdown-delay-s`."""

END_LIMIT_S = 20.0
RECOVERY_LIMIT_S = 30.0
POLL_S = 0.02

MOST_OF_THE_IMPORTS_S = 0.3
"""CPU seconds that a spare has used, at least, when it waits."""

SPARE_POLL_S = 0.5


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What came of a SIGTERM."""

    workers: int
    code: int
    seconds: float
    """Until the service was gone."""
    answered: int
    lost: Sequence[str]

    @property
    def faults(self) -> list[str]:
        return [*self.lost, *([f"exit code {self.code}"] if self.code else [])]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What came of a SIGKILL of one worker."""

    held: int
    """Connections that the worker had, each with a request in flight."""
    failed: int
    """Requests."""
    refused: int
    """Connections."""
    elsewhere: Sequence[str]
    """Requests that failed and were not in flight in the killed worker."""
    seconds: float
    """From the kill until as many workers served as before."""
    answered: int
    """Meanwhile."""

    @property
    def faults(self) -> list[str]:
        return [*self.elsewhere, *([f"{self.refused} connections were refused"] if self.refused else [])]


def ended(models: Path, sample: dict[str, Any], log: Path, *, workers: int) -> End:
    """Serve, ask, and end the service with SIGTERM."""
    flags = ["--shutdown-delay-s", str(DELAY_S)]
    with (
        serving(models, workers=workers, log=log, options=flags) as server,
        calling(server.port, sample, staying=STAYING, coming=COMING) as clients,
    ):
        time.sleep(LOADED_S)
        began_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(timeout=END_LIMIT_S)
        seconds = time.monotonic() - began_s
    return End(
        workers=workers,
        code=code,
        seconds=seconds,
        answered=sum(client.answered for client in clients),
        lost=[lost.why for client in clients for lost in client.lost],
    )


def killed(server: Server, clients: Sequence[Client]) -> Kill:
    """Kill the older one of two workers, and wait until another one has taken its place.

    Args:
        clients: at work, those that keep their connection with an answer already.
    """
    worker = min(_asked(server), key=psutil.Process.create_time)
    before = _restarts_and_workers(server.port)
    seen = [len(client.lost) for client in clients]
    worker.suspend()  # it takes no more connections, so that what it has is what it loses
    while worker.status() != psutil.STATUS_STOPPED:
        time.sleep(0)
    held, answered = _ports(worker), _answered(clients)
    began_s = time.monotonic()  # only now: connections are looked for for a second where thousands are closing
    worker.kill()
    while not _recovered(server.port, before):
        if time.monotonic() - began_s > RECOVERY_LIMIT_S:
            raise SystemExit(f"no worker took the place of the one that was killed within {RECOVERY_LIMIT_S:.0f} s")
        time.sleep(POLL_S)
    seconds = time.monotonic() - began_s
    failed = [client.lost[count:] for client, count in zip(clients, seen, strict=True)]
    return Kill(
        held=len(held),
        failed=sum(map(len, failed)),
        refused=sum(client.refused for client in clients),
        elsewhere=[why for lost in failed for why in _elsewhere(lost, held)],
        seconds=seconds,
        answered=_answered(clients) - answered,
    )


def _elsewhere(lost: Sequence[Lost], held: set[int]) -> list[str]:
    """What a kill does not explain: a caller has one request in flight."""
    return [it.why for i, it in enumerate(lost) if i or it.port not in held]


def _asked(server: Server) -> list[psutil.Process]:
    """The workers that callers are connected to; the spare is not."""
    return [process for process in server.process.children() if _ports(process)]


def _ports(worker: psutil.Process) -> set[int]:
    """Of callers that are connected to it."""
    return {it.raddr.port for it in worker.net_connections("tcp") if it.status == psutil.CONN_ESTABLISHED}


def _answered(clients: Sequence[Client]) -> int:
    return sum(client.answered for client in clients)


def _recovered(port: int, before: tuple[int, int]) -> bool:
    try:
        restarts, workers = _restarts_and_workers(port)
    except (OSError, urllib.error.URLError):  # the question was in flight there
        return False
    return restarts > before[0] and workers == before[1]


def _restarts_and_workers(port: int) -> tuple[int, int]:
    """As `/metrics` has them: workers count once they listen."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        page = response.read().decode()
    restarts, workers = (
        int(float(found))
        for name in ("evalmode_worker_restarts_total", "evalmode_workers")
        for found in re.findall(rf"^{name} (\S+)$", page, re.MULTILINE)
    )
    return restarts, workers


def kill(models: Path, sample: dict[str, Any], log: Path) -> Kill:
    """Serve with two workers and a spare that waits, ask, and kill one of them."""
    with serving(models, workers=2, log=log) as server:
        _wait_for_the_spare(server)
        with calling(server.port, sample, staying=STAYING, coming=COMING) as clients:
            time.sleep(LOADED_S)
            return killed(server, clients)


def _wait_for_the_spare(server: Server) -> None:
    """It is the last that was started, and waits when it has done its imports."""
    until_s = time.monotonic() + RECOVERY_LIMIT_S
    used_s, before_s = 0.0, -1.0
    while used_s < MOST_OF_THE_IMPORTS_S or used_s > before_s:
        if time.monotonic() > until_s:
            raise SystemExit(f"no spare waits after {RECOVERY_LIMIT_S:.0f} s")
        time.sleep(SPARE_POLL_S)
        spare = max(server.process.children(), key=psutil.Process.create_time)
        before_s, used_s = used_s, sum(spare.cpu_times()[:2])
