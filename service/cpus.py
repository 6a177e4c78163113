"""How many CPUs this process may use.

Rule 1: the least counts: of the CPUs it may run on, and of the quota of every control group above it.
Rule 2: what cannot be read limits nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress

from service.groups import groups, of_version_1


def usable_cpus() -> int:
    """How many CPUs this process may use, a part of one counted as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _quotas_cpus())]))


def _quotas_cpus() -> Iterator[float]:
    for group in groups():
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        folder = of_version_1("cpu")
        quota_us, period_us = (int((folder / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
        if quota_us > 0:
            yield quota_us / period_us
