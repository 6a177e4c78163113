"""How much of the machine the admission of one model may take.

A file of a few bytes can ask for any amount of memory and for a run that never ends. What is asked for beyond these
bounds fails inside the engine, and becomes a refusal.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import resource

SHARE = 0.75
"""Of the memory that is free, for one admission."""

GRACE_S = 15.0
"""For what the engine does not interrupt, such as computing with constants while it loads a graph."""

_NO_LIMIT = 2**62


def machine_memory_bytes() -> int:
    """Of the machine, or of the container where that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _NO_LIMIT
    return min(total, _number("/sys/fs/cgroup/memory.max", _NO_LIMIT))


def free_memory_bytes() -> int:
    """What can be taken without anybody being ended for it, of the machine or of the container."""
    in_container = _number("/sys/fs/cgroup/memory.max", _NO_LIMIT) - _number("/sys/fs/cgroup/memory.current", 0)
    return min(_kilobytes("/proc/meminfo", "MemAvailable", _NO_LIMIT // 1024) * 1024, max(in_container, 0))


@contextmanager
def bounded_memory(most_bytes: int) -> Iterator[None]:
    """In this block, this process may take so much more memory; where the system cannot bound it, any amount.

    All that the process does meanwhile counts, so it is for processes that serve nothing yet.
    """
    used_bytes = _kilobytes("/proc/self/status", "VmData", 0) * 1024
    if sys.platform == "win32" or not used_bytes:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used_bytes + most_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (min([it for it in (soft, wanted) if it >= 0]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def bounded_time(limit_s: float, late: Callable[[], None]) -> Iterator[None]:
    """If this block takes longer, `late` is called, in another thread."""
    timer = threading.Timer(limit_s, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kilobytes(file: str, name: str, otherwise: int) -> int:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return otherwise
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), otherwise)


def _number(file: str, otherwise: int) -> int:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):
        return otherwise
