"""`evalmode serve` in a process of its own, while something is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAM = ("-m", "service.cli")


@dataclass(frozen=True, slots=True)
class Started:
    """A running one."""

    address: str
    process: psutil.Process
    """Where there are several, the one that started the others."""

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    @property
    def cpu_s(self) -> float:
        used = self.process.cpu_times()
        return float(used.user + used.system)

    @property
    def resident_mb(self) -> float:
        return float(self.process.memory_info().rss / 2**20)


@contextmanager
def started(
    path: Path,
    *options: str,
    log: Path | None = None,
    program: Sequence[str] = PROGRAM,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """Serve a model or a folder of them until the block ends, unless it was ended before.

    Args:
        log: for what it prints.
        program: of Python, that takes the command line of `evalmode`.
        environment: beside that of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = log or Path(folder) / "log"
        command = [sys.executable, *program, "serve", str(path), "--port", "0", *options]
        with log.open("wb") as printed:
            process = subprocess.Popen(
                command, stdout=printed, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )
        try:
            while "curl " not in (said := log.read_text(errors="replace")):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode}: {said[-1000:]}")
                time.sleep(0.05)
            line = next(line for line in said.splitlines() if line.startswith("serving at"))
            yield Started(line.split()[-1], psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
