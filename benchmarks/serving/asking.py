"""How a server is asked for a workload: where it will be, and with what."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.serving.answers import Client
from benchmarks.serving.load import write_bodies
from benchmarks.serving.process import Running, free_port
from benchmarks.serving.servers import ECHO, Server
from benchmarks.serving.wire import Wire, constant
from benchmarks.serving.workloads import BUILD, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """One server, which is not started yet, and one workload."""

    server: Server
    workload: Workload
    port: int
    url: str
    bodies: Path
    """Of all requests, for wrk."""
    echoed: Path
    """What the echo answers."""
    client: Client

    @classmethod
    def prepared(cls, server: Server, workload: Workload) -> Self:
        """With a port of its own, and its files under its name."""
        wire = server.asked[workload.name]
        assert isinstance(wire, Wire)
        requests = workload.requests(wire)
        bodies, echoed = BUILD / "bodies" / server.name, BUILD / "bodies" / f"{server.name}.json"
        write_bodies(bodies, requests)
        echoed.write_text(json.dumps(constant(wire, workload.name, workload.expected[0])))
        port = free_port()
        url = server.url(workload, port)
        client = Client(url, workload, requests, echo=server.peer == ECHO)
        return cls(server=server, workload=workload, port=port, url=url, bodies=bodies, echoed=echoed, client=client)

    def started(self, programs: Path) -> Running:
        return self.server.started(self.workload, self.port, programs=programs, constant=self.echoed)
