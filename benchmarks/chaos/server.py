"""`evalmode serve` under chaos, and what its processes hold."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos.requests import BODY_LIMIT_BYTES
from benchmarks.started import started

LIMITS = ("--body-limit-bytes", str(BODY_LIMIT_BYTES), "--max-queue-rows", "100000")
OPTIONS = (*LIMITS, "--max-queue-s", "0")
"""Nobody is refused for what others send."""

SETTLED_S = 15.0
"""So long may it take until what clients left behind is gone."""


REST_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one process holds."""

    pid: int
    descriptors: int
    threads: int
    connections: int
    memory_mb: float
    """Proportional: what processes share is divided among them."""
    own_mb: float
    """Memory that it shares with no other."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the processes of a server hold."""

    each: tuple[Holding, ...]
    """The one that started the others comes first."""

    @property
    def processes(self) -> int:
        return len(self.each)

    @property
    def descriptors(self) -> int:
        return sum(one.descriptors for one in self.each)

    @property
    def threads(self) -> int:
        return sum(one.threads for one in self.each)

    @property
    def connections(self) -> int:
        return sum(one.connections for one in self.each)

    @property
    def memory_mb(self) -> float:
        """What they share is counted once."""
        return sum(one.memory_mb for one in self.each)


@dataclass(frozen=True, slots=True)
class Server:
    """A running one."""

    port: int
    process: psutil.Process

    def held(self) -> Held:
        each = []
        for one in (self.process, *self.process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # it ended just now
                each.append(_holding(one))
        return Held(tuple(each))

    def has_started(self, workers: int) -> bool:
        """Each process has its event loop; of several workers, also the one that starts them and the spare."""
        processes = [self.process, *self.process.children()]
        return len(processes) == (1 if workers == 1 else workers + 2) and all(map(_has_loop, processes))

    def rest(self) -> None:
        """Wait until no process opens or closes a file any more."""
        before = -1
        while before != (before := self.held().descriptors):
            time.sleep(REST_S)

    def held_when(self, settled: Callable[[Held], bool], *, within_s: float = SETTLED_S) -> Held:
        """What it holds as soon as that is so; or what it still holds after that time."""
        until_s = time.monotonic() + within_s
        while True:
            held = self.held()
            if settled(held) or time.monotonic() > until_s:
                return held
            time.sleep(0.1)


def _has_loop(process: psutil.Process) -> bool:
    try:
        return any("eventpoll" in os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir())
    except OSError:  # it opens and closes files
        return False


def _holding(process: psutil.Process) -> Holding:
    memory = process.memory_full_info()
    return Holding(
        pid=process.pid,
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        connections=sum(one.status != psutil.CONN_LISTEN for one in process.net_connections("tcp")),
        memory_mb=memory.pss / 2**20,
        own_mb=memory.uss / 2**20,
    )


@contextmanager
def serving(models: Path, *, workers: int, log: Path, options: Sequence[str] = OPTIONS) -> Iterator[Server]:
    """Serve a repository until the block ends, unless it was ended before.

    Args:
        log: what the server prints.
    """
    with started(models, "--workers", str(workers), *options, log=log) as one:
        server = Server(one.port, one.process)
        server.held_when(lambda _: server.has_started(workers))
        server.rest()
        yield server
