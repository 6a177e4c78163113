"""The real command, started as a user starts it, and stopped."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

START_LIMIT_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A running `evalmode serve`."""

    process: subprocess.Popen[str]
    address: str
    printed: str
    started_s: float
    """From the start of the process until it said that it listens."""

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=20)


Serve = Callable[..., Serving]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start `evalmode serve PATH --port 0 [flags]` and wait until it has printed its call.

    `inside` is a command that runs the one that follows it.
    """
    running: list[subprocess.Popen[str]] = []

    def start(path: Path, *flags: str, inside: Sequence[str] = ()) -> Serving:
        command = [*inside, sys.executable, "-m", "service.cli", "serve", str(path), "--port", "0", *flags]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(process)
        killer = threading.Timer(START_LIMIT_S, process.kill)
        killer.start()
        lines: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "curl http" in line:
                break
        killer.cancel()
        printed = "".join(lines)
        found = re.search(r"serving at +(https?://\S+)", printed)
        assert found, printed
        return Serving(process=process, address=found[1], printed=printed, started_s=time.perf_counter() - started)

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=20)
        if process.stdout is not None:
            process.stdout.close()
