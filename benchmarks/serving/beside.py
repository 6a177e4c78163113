"""The bare echo beside everything that is measured: how fast the machine is at that moment.

A machine with neighbours changes its speed within seconds, and by half; what was measured a minute apart has no ratio.
So the echo runs all the time, and is driven just before and just after each cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.serving.asking import Asking
from benchmarks.serving.load import WrkFailed, driven
from benchmarks.serving.servers import ECHO, SERVERS
from benchmarks.serving.workloads import Workload

BESIDE_S = 1


@dataclass(frozen=True, slots=True)
class Echo:
    """The echo, as it is asked for a workload."""

    url: str
    bodies: Path

    def requests_per_s(self, connections: int) -> float | None:
        """At this moment; None if it did not answer all, which is nobody's fault who is measured beside it."""
        try:
            load = driven(self.url, self.bodies, connections=connections, seconds=BESIDE_S)
        except WrkFailed:
            return None
        return None if load.non_2xx or load.socket_errors or not load.requests else load.requests_per_s


@contextmanager
def echo_beside(workload: Workload, *, programs: Path) -> Iterator[Echo]:
    """
    Args:
        programs: of the echo's environment.

    Raises:
        DidNotStart: the echo does not answer.
    """
    echo = next(server for server in SERVERS if server.name == ECHO)
    asking = Asking.prepared(replace(echo, name="echo-beside"), workload)
    try:
        with asking.started(programs) as running:
            running.first_answer_s(asking.client.first_wrong)
            yield Echo(asking.url, asking.bodies)
    finally:
        asking.client.close()
