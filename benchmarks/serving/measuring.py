"""The rounds: every server started, checked, driven and stopped, in an order that turns; what was measured, as it came.

Rule 1: nothing is retried. A cell with one answer that is not 2xx, or one socket error, is kept and is invalid.
Rule 2: a server that fails to start or answers wrong is a run with a reason, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving import in_process
from benchmarks.serving.answers import WrongAnswer
from benchmarks.serving.asking import Asking
from benchmarks.serving.beside import Echo
from benchmarks.serving.installing import EVALMODE
from benchmarks.serving.load import WARM_UP_S, WrkFailed, driven
from benchmarks.serving.process import DidNotStart, Running, machine_cpu_s
from benchmarks.serving.records import Cell, InProcess, Run
from benchmarks.serving.servers import NEAR, Server
from benchmarks.serving.wire import Wire
from benchmarks.serving.workloads import CROWD, USUAL, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How long and how often."""

    rounds: int
    seconds: int
    far_rounds: int | None = None
    """Of the servers that no bar is judged by and none is near to; None: as many."""
    connections: tuple[int, ...] | None = None
    """In place of each workload's own."""

    def connections_of(self, workload: Workload, server: Server) -> tuple[int, ...]:
        usual = self.connections or workload.connections
        if not workload.crowd or server.name != EVALMODE:
            return usual
        others = [connections for connections in usual if connections != USUAL]
        return (*others, USUAL, CROWD)  # the last two are held against each other, so they come one after the other


Tell = Callable[[str], None]


def turned(servers: Sequence[Server], round_number: int) -> list[Server]:
    """The order of a round: each begins in another round."""
    start = round_number % len(servers)
    return [*servers[start:], *servers[:start]]


def steps(workload: Workload, servers: Sequence[Server], settings: Settings) -> Iterator[tuple[int, Server]]:
    """Rounds and servers, in the order in which they are measured."""
    asked = [server for server in servers if isinstance(server.asked[workload.name], Wire)]
    for round_number in range(settings.rounds):
        far = settings.far_rounds is None or round_number < settings.far_rounds
        for server in turned([server for server in asked if far or server.name in NEAR], round_number):
            yield round_number, server


def measured_run(
    workload: Workload,
    round_number: int,
    server: Server,
    *,
    programs: Path,
    echo: Echo,
    settings: Settings,
    tell: Tell,
) -> Run:
    """One server in one round."""
    asking = Asking.prepared(server, workload)
    url, bodies = asking.url, asking.bodies
    cells: list[Cell] = []
    first_answer_s = None
    failure = None
    try:
        with asking.started(programs) as running:
            first_answer_s = running.first_answer_s(asking.client.first_wrong)
            asking.client.check_all()
            for connections in settings.connections_of(workload, server):
                driven(url, bodies, connections=connections, seconds=WARM_UP_S)
                cell = _cell(running, echo, url, bodies, connections, settings.seconds)
                cells.append(cell)
                tell(f"{connections:>5} connections  {_said(cell)}")
    except (DidNotStart, WrongAnswer, WrkFailed) as error:
        failure = f"{type(error).__name__}: {error}"
        tell(failure)
    finally:
        asking.client.close()
    return Run(
        workload=workload.name, round=round_number, server=server.name, first_answer_s=first_answer_s,
        cells=tuple(cells), failure=failure,
    )  # fmt: skip


def measured_in_process(workload: Workload, round_number: int, seconds: int) -> list[InProcess]:
    """With one thread, and with all that evalmode may use."""
    return [
        InProcess(workload=workload.name, round=round_number, threads=threads, **in_process.timed(
            workload, threads=threads, seconds=seconds
        ))
        for threads in in_process.threads()
    ]  # fmt: skip


def _cell(running: Running, echo: Echo, url: str, bodies: Path, connections: int, seconds: int) -> Cell:
    echo_before_per_s = echo.requests_per_s(connections)
    began, before_s, machine_before_s = time.perf_counter(), running.cpu_s(), machine_cpu_s()
    load = driven(url, bodies, connections=connections, seconds=seconds)
    used_s, machine_s = running.cpu_s() - before_s, machine_cpu_s() - machine_before_s
    took_s = time.perf_counter() - began
    memory_mb = running.pss_mb()
    return Cell(
        connections=connections,
        requests=load.requests,
        requests_per_s=load.requests_per_s,
        echo_per_s=_mean(echo_before_per_s, echo.requests_per_s(connections)),
        p50_ms=load.p50_ms,
        p99_ms=load.p99_ms,
        p999_ms=load.p999_ms,
        cpu_s_per_1000=used_s / max(load.requests, 1) * 1000,
        memory_mb=memory_mb,
        strangers_cpus=max(0.0, machine_s - used_s - load.cpu_s) / took_s,
        errors=load.non_2xx + load.socket_errors,
    )


def _mean(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else (before + after) / 2


def _said(cell: Cell) -> str:
    errors = "" if cell.valid else f"  INVALID: {cell.requests} answers, {cell.errors} errors"
    return f"{cell.requests_per_s:>9,.0f}/s  p50 {cell.p50_ms:.2f} ms  p99 {cell.p99_ms:.2f} ms{errors}"


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
