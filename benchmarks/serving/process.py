"""A server as a process: started, asked, measured with all its children, and stopped with all of them.

Rule 1: only processes that this file started, and their descendants, are ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

START_LIMIT_S = 60
STOP_LIMIT_S = 8
POLL_S = 0.01
PORTS = range(20_000, 32_000)


class DidNotStart(Exception):
    """The server ended, or did not answer in time; with the last of what it printed."""


class Running:
    """A started server and its descendants."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path, room: Path
    ) -> None:
        """Start it.

        Args:
            folder: what it runs in.
            log: what it prints.
            room: an empty folder that it may fill.
        """
        self._log = log
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)
        with log.open("wb") as printed:
            self._started = time.perf_counter()
            self._process = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=printed,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._root = psutil.Process(self._process.pid)
        self._seen: set[psutil.Process] = {self._root}

    def first_answer_s(self, wrong: Callable[[], str | None]) -> float:
        """Seconds from the start of the process until nothing is wrong with an answer.

        Raises:
            DidNotStart: something always was.
        """
        while reason := wrong():
            if self._process.poll() is not None:
                raise DidNotStart(f"it ended with {self._process.returncode}: {self._last_words()}")
            if time.perf_counter() - self._started > START_LIMIT_S:
                raise DidNotStart(f"no right answer within {START_LIMIT_S} s; the last: {reason}")
            time.sleep(POLL_S)
        return time.perf_counter() - self._started

    def cpu_s(self) -> float:
        """CPU seconds that the processes which live now have used."""
        total = 0.0
        for process in self._alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def pss_mb(self) -> float:
        """Memory of all processes; what they share is counted once, not once each."""
        total = 0
        for process in self._alive():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
        return total / 2**20

    def stop(self) -> None:
        """Ask, then end what is left."""
        alive = self._alive()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_LIMIT_S)
        for process in alive | self._alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        deadline = time.perf_counter() + STOP_LIMIT_S
        while self._alive() and time.perf_counter() < deadline:
            time.sleep(POLL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _alive(self) -> set[psutil.Process]:
        for process in list(self._seen):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen.update(process.children(recursive=True))
        return {process for process in self._seen if _runs(process)}

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-400:] or "it printed nothing"


def _runs(process: psutil.Process) -> bool:
    """A process that ended and that nobody waited for yet, a zombie, does not run."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def machine_cpu_s() -> float:
    """CPU seconds that all processes of this machine have used, and what its host took away."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def free_port() -> int:
    """A port with two free ones behind it, for a server that takes more than one.

    Below the range that the system gives to clients: wrk's closed connections hold ports there for a minute.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for i in range(3):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port + i))
            return port
    raise OSError(f"no free port from {PORTS[0]} to {PORTS[-1]}")


def clean_environment(programs: Path, **more: str) -> dict[str, str]:
    """What a server sees: a user's environment without anything that was meant for the benchmark's own Python.

    Args:
        programs: of the server's own environment; they come first.
    """
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"} | more
