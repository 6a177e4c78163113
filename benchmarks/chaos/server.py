"""`evalmode serve` under chaos, and what its processes hold."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos.requests import BODY_LIMIT_BYTES

SETTLED_S = 15.0
"""So long may it take until what clients left behind is gone."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the processes of a server hold together."""

    processes: int
    descriptors: int
    threads: int
    connections: int
    memory_mb: float
    """Proportional: what processes share is counted once."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running one."""

    port: int
    process: psutil.Process

    def held(self) -> Held:
        alive = [self.process, *self.process.children(recursive=True)]
        connections = [c for one in alive for c in one.net_connections("tcp") if c.status != psutil.CONN_LISTEN]
        return Held(
            processes=len(alive),
            descriptors=sum(one.num_fds() for one in alive),
            threads=sum(one.num_threads() for one in alive),
            connections=len(connections),
            memory_mb=sum(one.memory_full_info().pss for one in alive) / 2**20,
        )

    def held_when(self, settled: Callable[[Held], bool]) -> Held:
        """What it holds as soon as that is so; or what it still holds after `SETTLED_S`."""
        until_s = time.monotonic() + SETTLED_S
        while True:
            held = self.held()
            if settled(held) or time.monotonic() > until_s:
                return held
            time.sleep(0.1)


@contextmanager
def serving(models: Path, *, workers: int, log: Path, flags: Sequence[str] = ()) -> Iterator[Server]:
    """Serve a repository until the block ends, unless it was ended before.

    Args:
        log: what the server prints.
    """
    command = [sys.executable, "-m", "service.cli", "serve", str(models), "--port", "0", "--workers", str(workers)]
    command += ["--body-limit-bytes", str(BODY_LIMIT_BYTES), "--max-queue-rows", "100000", *flags]
    with log.open("wb") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
    try:
        while "curl " not in (said := log.read_text(errors="replace")):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}: {said[-1000:]}")
            time.sleep(0.05)
        address = next(line for line in said.splitlines() if line.startswith("serving at"))
        yield Server(int(address.rsplit(":", 1)[1]), psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
