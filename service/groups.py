"""The control groups of this process, as Linux shows them: each may bound what the process takes.

Rule 1: all groups above count, not only the own one: in a container that is its own limit; under systemd the limit
    stands some groups above.
Rule 2: what cannot be read is not there.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def groups() -> list[Path]:
    """The control group of this process and all above it; those that are out of sight are not there to be read."""
    own: list[str] = []
    with suppress(OSError):
        lines = OWN_GROUP.read_text().splitlines()
        own = next((line[len("0::/") :].split("/") for line in lines if line.startswith("0::/")), [])
    return [GROUPS.joinpath(*own[:depth]) for depth in range(len(own) + 1)]


def of_version_1(controller: str) -> Path:
    """A controller's folder in version 1 of control groups, as a container sees it."""
    return GROUPS / controller
