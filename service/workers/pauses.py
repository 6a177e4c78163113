"""How long to wait before a process that ended is started again."""

from __future__ import annotations

STEADY_S = 10.0
"""A process that lived this long did not fail at its start."""


def pause_s(failures: int) -> float:
    """
    Args:
        failures: at the start, in a row.

    Returns:
        Nothing the first time, then 1, 2, 4, ... 30 seconds.
    """
    return 0.0 if failures <= 1 else min(30.0, 2.0 ** min(failures - 2, 5))
