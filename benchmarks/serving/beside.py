"""The bare echo beside everything that is measured: how fast the machine is at that moment.

A machine with neighbours changes its speed within seconds, and by half; what was measured a minute apart has no ratio.
So the echo runs all the time, and is driven just before and just after each cell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.serving.answers import Client
from benchmarks.serving.load import WrkFailed, driven, write_bodies
from benchmarks.serving.process import free_port
from benchmarks.serving.servers import ECHO, SERVERS
from benchmarks.serving.wire import Wire, constant
from benchmarks.serving.workloads import BUILD, Workload

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
    server = replace(next(server for server in SERVERS if server.name == ECHO), name="echo-beside")
    wire = server.asked[workload.name]
    assert isinstance(wire, Wire)
    requests = workload.requests(wire)
    bodies, echoed = BUILD / "bodies-beside", BUILD / "constant-beside.json"
    write_bodies(bodies, requests)
    echoed.write_text(json.dumps(constant(wire, workload.name, workload.expected[0])))
    port = free_port()
    url = server.url(workload, port)
    client = Client(url, workload, requests, echo=True)
    try:
        with server.started(workload, port, programs=programs, constant=echoed) as running:
            running.first_answer_s(client.first_wrong)
            yield Echo(url, bodies)
    finally:
        client.close()
