"""How much of the machine the admission of one model may take, and how much of its memory what clients sent.

A file of a few bytes can ask for any amount of memory and for a run that never ends. What is asked for beyond these
bounds fails inside the engine, and becomes a refusal.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from service.groups import groups, of_version_1

if sys.platform != "win32":
    import resource

SHARE = 0.75
"""Of the memory that is free, for one admission."""

HELD_SHARE = 1 / 8
"""Of the memory: for requests that wait for a model, in all processes, and as much again for bodies that are read."""

GRACE_S = 15.0
"""For what the engine does not interrupt, such as computing with constants while it loads a graph."""

MEMINFO = Path("/proc/meminfo")

_NO_LIMIT = 2**62


def machine_memory_bytes() -> int:
    """Of the machine, or of the container where that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _NO_LIMIT
    return min([total, *(bound.most_bytes for bound in _bounds())])


def free_memory_bytes() -> int:
    """What can be taken without anybody being ended for it, of the machine or of the container."""
    on_machine = _value(MEMINFO, "MemAvailable:", _NO_LIMIT // 1024) * 1024
    return min([on_machine, *(bound.free_bytes for bound in _bounds())])


def held_at_most(count_bytes: int, *, processes: int) -> int:
    """So many bytes of requests for each process; less where the memory of the machine or the container is small."""
    return min(count_bytes, int(machine_memory_bytes() * HELD_SHARE / processes))


@final
@dataclass(frozen=True, slots=True)
class _Bound:
    """That of a control group."""

    most_bytes: int
    used_bytes: int
    given_back_bytes: int
    """Of what is used, what the system takes back before it ends anybody: files that were read, as those of models
    are, and that nobody reads now."""

    @property
    def free_bytes(self) -> int:
        return max(0, self.most_bytes - max(0, self.used_bytes - self.given_back_bytes))


def _bounds() -> Iterator[_Bound]:
    for group in groups():
        stat = group / "memory.stat"
        given_back = _value(stat, "inactive_file", 0) + _value(stat, "slab_reclaimable", 0)
        yield _Bound(_number(group / "memory.max", _NO_LIMIT), _number(group / "memory.current", 0), given_back)
    folder = of_version_1("memory")
    yield _Bound(
        _number(folder / "memory.limit_in_bytes", _NO_LIMIT),
        _number(folder / "memory.usage_in_bytes", 0),
        _value(folder / "memory.stat", "total_inactive_file", 0),
    )


@contextmanager
def bounded_memory(most_bytes: int) -> Iterator[None]:
    """In this block, this process may take so much more memory; where the system cannot bound it, any amount.

    All that the process does meanwhile counts, so it is for processes that serve nothing yet.
    """
    used_bytes = _value(Path("/proc/self/status"), "VmData:", 0) * 1024
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


def _value(file: Path, name: str, otherwise: int) -> int:
    """Of the line that begins with this name."""
    try:
        lines = map(str.split, file.read_text().splitlines())
        return next((int(line[1]) for line in lines if line[:1] == [name]), otherwise)
    except (OSError, ValueError, IndexError):
        return otherwise


def _number(file: Path, otherwise: int) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return otherwise
