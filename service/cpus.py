"""How much of the machine this process may use.

Rule 1: the least counts: of the CPUs it may run on, and of the quota of every control group above it. In a container
    that is its own limit; under systemd the limit stands some groups above.
Rule 2: what cannot be read limits nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """How many CPUs this process may use, a part of one counted as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _quotas_cpus())]))


def _quotas_cpus() -> Iterator[float]:
    for group in _groups():
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota) / int(period)
    with suppress(OSError, ValueError):  # version 1 of control groups, as a container sees it
        quota_us, period_us = (int((GROUPS / "cpu" / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
        if quota_us > 0:
            yield quota_us / period_us


def _groups() -> list[Path]:
    """The control group of this process and all above it; those that are out of sight are not there to be read."""
    own: list[str] = []
    with suppress(OSError):
        lines = OWN_GROUP.read_text().splitlines()
        own = next((line[len("0::/") :].split("/") for line in lines if line.startswith("0::/")), [])
    return [GROUPS.joinpath(*own[:depth]) for depth in range(len(own) + 1)]
