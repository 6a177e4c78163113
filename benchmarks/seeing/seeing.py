"""What a second of CPU gives by turns, and what is made of it."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import final

import numpy as np
from rich.progress import track

from benchmarks.serving.load import driven
from benchmarks.serving.workloads import Workload
from benchmarks.started import Started, started

CONNECTIONS, WARM_UP_S, TURN_S = 32, 2, 1.0
EXPORT_EVERY_MS = "1000"
"""Spans leave in each turn; usually it is every five seconds, which most turns would not see."""
RESAMPLES = 2000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """How much is seen of a server."""

    name: str
    options: Sequence[str] = ()
    traced: bool = False
    scraped: bool = False


SIGHTS = (Sight(name="usual"), Sight(name="all", options=("--log-format", "json"), traced=True, scraped=True))


@final
@dataclass(frozen=True, slots=True)
class Share:
    """Of the throughput, what is left to who sees."""

    median: float
    error: float
    """Its standard error."""
    cpu_us: float
    """CPU time of a prediction, seen or not."""

    def __str__(self) -> str:
        return f"{self.median:.3f} ± {self.error:.3f} of the throughput, {self.cpu_us:.0f} us a prediction"


def share(instants: Sequence[Sequence[int]]) -> Share:
    """
    Args:
        instants: CPU time in ns, and predictions until then; between two of them is a turn, blind the first and the
            last.
    """
    cpu_ns, predictions = np.diff(np.asarray(instants, np.float64), axis=0).T
    rates = predictions / cpu_ns
    shares = rates[1:-1:2] / np.sqrt(rates[:-2:2] * rates[2::2])
    resampled = np.random.default_rng(1).choice(shares, (RESAMPLES, len(shares)))
    error, cpu_us = np.median(resampled, axis=1).std(), np.median(1 / rates) / 1e3
    return Share(round(float(np.median(shares)), 4), round(float(error), 4), round(float(cpu_us), 1))


def seen(sight: Sight, workload: Workload, folder: Path, *, turns: int) -> Share:
    """
    Args:
        folder: holds the bodies of the workload in `bodies`.
        turns: in which it sees.
    """
    written = folder / f"{sight.name}.turns"
    with collecting() as collector:
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_BSP_SCHEDULE_DELAY": EXPORT_EVERY_MS}
        program = ("-m", "benchmarks.seeing.switched", str(written))
        serving = started(workload.network, *sight.options, program=program, environment=traced if sight.traced else {})
        with serving as server, ThreadPoolExecutor() as threads:
            url = f"{server.address}/v2/models/{workload.network.stem}/infer"
            lasts_s = WARM_UP_S + int((2 * turns + 2) * TURN_S) + 1
            load = threads.submit(driven, url, folder / "bodies", connections=CONNECTIONS, seconds=lasts_s)
            time.sleep(WARM_UP_S)
            for turn in track(range(2 * turns + 1), sight.name):
                take_turn(server, scraped=sight.scraped and turn % 2 == 1)
            server.process.send_signal(signal.SIGUSR1)
            ended = load.result()
    if ended.non_2xx or ended.socket_errors:
        raise SystemExit(f"{sight.name}: {ended.non_2xx} answers were not 2xx, {ended.socket_errors} socket errors")
    if sight.traced and not collector.taken_bytes:
        raise SystemExit(f"{sight.name}: the collector got no spans")
    instants = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    if [sees for sees, *_ in instants] != [turn % 2 == 1 for turn in range(2 * turns + 2)]:
        raise SystemExit(f"{sight.name}: the turns that were taken are not those that were asked for")
    return share([at for _, *at in instants])


def take_turn(server: Started, *, scraped: bool) -> None:
    until_s = time.monotonic() + TURN_S
    server.process.send_signal(signal.SIGUSR1)
    if scraped:
        time.sleep(TURN_S / 4)
        with urllib.request.urlopen(f"{server.address}/metrics", timeout=10) as page:
            page.read()
    time.sleep(max(0.0, until_s - time.monotonic()))


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
