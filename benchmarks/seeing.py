"""What it costs to be seen: metrics, the access log and traces, against a server that counts nothing.

Question: what does the operator pay for seeing?
Quantities: CPU seconds for a prediction of a small dense network, by three servers:
    blind   counts nothing of predictions but how many began, and writes no log
    usual   as it comes: counts all, and writes the sampled log
    seen    that as JSON, `GET /metrics` once a second, and spans to a collector
Each of the others is driven at the same time as `blind`, with 32 connections each: a machine with neighbours changes
its speed within seconds, and what was measured one after the other differs by more than what is looked for here. One
loop computes and answers, so its throughput falls as its CPU seconds rise. What is said is the median of the ratios of
all rounds, with its quartiles.
Limit: 1.05.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import final

import psutil
from rich.progress import track

from benchmarks.environment import environment
from benchmarks.serving.load import Load, driven, write_bodies
from benchmarks.serving.workloads import Workload, dense

RESULT = Path(__file__).parent / "results" / "seeing.json"
ROUNDS, SECONDS, CONNECTIONS = 80, 2, 32
LIMIT = 1.05
BLIND = "blind"
CLI = "from service.cli import main; main()"
COUNTS_NOTHING = (
    "from service.statistics import Statistics; "
    "Statistics.answered = Statistics.ran = Statistics.failed = lambda *_, **__: None; "
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """How much is seen of a server."""

    name: str
    program: str = CLI
    options: Sequence[str] = ()
    traced: bool = False
    scraped: bool = False


SIGHTS = (
    Sight(name=BLIND, program=COUNTS_NOTHING + CLI, options=("--access-log", "off")),
    Sight(name="usual"),
    Sight(name="seen", options=("--log-format", "json"), traced=True, scraped=True),
)


@final
@dataclass(frozen=True, slots=True)
class Served:
    """A running one."""

    sight: Sight
    address: str
    url: str
    process: psutil.Process


def main() -> int:
    workload = dense()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        bodies = Path(folder) / "bodies"
        write_bodies(bodies, workload.requests(workload.wire))
        collector = running.enter_context(collecting())
        blind, *others = [running.enter_context(serving(sight, workload, Path(folder), collector)) for sight in SIGHTS]
        ratios: dict[str, list[float]] = {other.sight.name: [] for other in others}
        for _ in track(range(ROUNDS), "rounds"):
            for other in others:
                blind_s, other_s = at_once([blind, other], bodies)
                ratios[other.sight.name].append(other_s / blind_s)
    spread = {
        name: [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]
        for name, values in ratios.items()
    }
    for name, (low, median, high) in spread.items():
        print(f"{name}: {median:.3f} of the CPU seconds of {BLIND} ({low:.3f} to {high:.3f})")
    print(f"the collector took {collector.taken_bytes / 1e6:.1f} MB of spans")
    report = {
        "rounds": ROUNDS,
        "seconds": SECONDS,
        "connections": CONNECTIONS,
        "cpu_quartiles": spread,
        **environment(),
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULT}")
    return 0 if all(median <= LIMIT for _, median, _ in spread.values()) else 1


def at_once(servers: Sequence[Served], bodies: Path) -> list[float]:
    """CPU seconds of each for a request."""
    before_s = [cpu_s(one.process) for one in servers]
    with ExitStack() as while_driven, ThreadPoolExecutor() as threads:
        for one in servers:
            if one.sight.scraped:
                while_driven.enter_context(scraping(one.address))
        loads = list(threads.map(lambda one: driven_well(one, bodies), servers))
    return [
        (cpu_s(one.process) - before) / load.requests
        for one, before, load in zip(servers, before_s, loads, strict=True)
    ]


def driven_well(one: Served, bodies: Path) -> Load:
    load = driven(one.url, bodies, connections=CONNECTIONS, seconds=SECONDS)
    if load.non_2xx or load.socket_errors:
        raise SystemExit(f"{one.sight.name}: {load.non_2xx} answers were not 2xx, {load.socket_errors} socket errors")
    return load


def cpu_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


@contextmanager
def serving(sight: Sight, workload: Workload, folder: Path, collector: Collector) -> Iterator[Served]:
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address} if sight.traced else {}
    command = [sys.executable, "-c", sight.program, "serve", str(workload.network), "--port", "0", *sight.options]
    with (folder / f"{sight.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **traced})
    try:
        assert process.stdout is not None
        address = next((line.split()[-1] for line in process.stdout if line.startswith("serving at")), None)
        if address is None:
            raise SystemExit(f"{sight.name} did not start: {(folder / f'{sight.name}.log').read_text()}")
        url = f"{address}/v2/models/{workload.network.stem}/infer"
        yield Served(sight, address, url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def scraping(address: str) -> Iterator[None]:
    """As a Prometheus that asks every second."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(1.0):
            with urllib.request.urlopen(f"{address}/metrics", timeout=10) as page:
                page.read()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass
class Collector:
    """Takes spans and throws them away."""

    address: str = ""
    taken_bytes: int = 0


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            collector.taken_bytes += len(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collector.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    sys.exit(main())
