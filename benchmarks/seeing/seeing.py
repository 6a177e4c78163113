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
from random import Random
from typing import final

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.serving.load import driven
from benchmarks.serving.workloads import Workload
from benchmarks.started import Started, started
from service.tracing import TRACES_S

CONNECTIONS, WARM_UP_S, TURN_S = 32, 2, 0.1
STRETCH = 40
"""Turns, of which half see: two seconds of the shares that log and traces have."""
EXPORT_S, SCRAPE_S = 5, 15
"""Seconds of seeing."""
NEVER_MS = "3600000"
"""The SDK would send in turns that are blind, too; switched.py has it send."""
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

    share: float
    error: float
    """Its standard error."""
    cpu_us: float
    """CPU time of a prediction that nobody sees."""

    def __str__(self) -> str:
        return f"{self.share:.4f} ± {self.error:.4f} of the throughput, {self.cpu_us:.1f} us a prediction"


def sees(turn: int) -> bool:
    """One of two turns sees, now the first and now the second: what the server does once a second falls into both."""
    pair, second = divmod(turn, 2)
    return bool(Random(pair).getrandbits(1)) != bool(second)


def share(instants: Sequence[Sequence[int]]) -> Share:
    """
    Args:
        instants: CPU time in ns, and predictions until then; between two of them is a turn, which sees as `sees` says,
            and there are whole stretches of them.
    """
    turns = np.diff(np.asarray(instants, np.float64), axis=0)
    seeing = np.array([sees(turn) for turn in range(len(turns))])
    kinds = [turns[kind].reshape(-1, STRETCH // 2, 2).sum(axis=1) for kind in (~seeing, seeing)]
    stretches = np.stack(kinds, axis=1)
    """By stretch, blind or seeing, CPU time and predictions."""
    chosen = np.random.default_rng(1).integers(len(stretches), size=(RESAMPLES, len(stretches)))
    error = _share(stretches[chosen].sum(axis=1)).std()
    cpu_ns, predictions = stretches.sum(axis=0)[0]
    return Share(
        round(float(_share(stretches.sum(axis=0))), 4), round(float(error), 4), round(cpu_ns / predictions / 1e3, 1)
    )


def _share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., blind or seeing, CPU time and predictions) -> (...)"""
    rates = sums[..., 1] / sums[..., 0]
    return np.asarray(rates[..., 1] / rates[..., 0])


def seen(sight: Sight, workload: Workload, folder: Path, *, stretches: int) -> Share:
    """
    Args:
        folder: holds the bodies of the workload in `bodies`.
        stretches: of turns.
    """
    written = folder / f"{sight.name}.turns"
    with collecting() as collector:
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_BSP_SCHEDULE_DELAY": NEVER_MS}
        program = ("-m", "benchmarks.seeing.switched", str(written))
        serving = started(workload.network, *sight.options, program=program, environment=traced if sight.traced else {})
        with serving as server, ThreadPoolExecutor() as threads:
            url = f"{server.address}/v2/models/{workload.network.stem}/infer"
            lasts_s = WARM_UP_S + int(stretches * STRETCH * TURN_S) + 1
            load = threads.submit(driven, url, folder / "bodies", connections=CONNECTIONS, seconds=lasts_s)
            time.sleep(WARM_UP_S)
            take_turns(server, stretches, sight)
            ended = load.result()
    if ended.non_2xx or ended.socket_errors:
        raise SystemExit(f"{sight.name}: {ended.non_2xx} answers were not 2xx, {ended.socket_errors} socket errors")
    wanted = TRACES_S * stretches * STRETCH * TURN_S / 2 if sight.traced else 0
    if not 0.8 * wanted <= collector.predictions <= 1.2 * wanted:
        raise SystemExit(f"{sight.name}: {collector.predictions} predictions had a span, and not about {wanted:.0f}")
    instants = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    if [seeing for seeing, *_ in instants] != [sees(turn) for turn in range(stretches * STRETCH + 1)]:
        raise SystemExit(f"{sight.name}: the turns that were taken are not those that were asked for")
    return share([at for _, *at in instants])


def take_turns(server: Started, stretches: int, sight: Sight) -> None:
    """A signal at the start of each, and one at the end of the last."""
    began_s, scrape_every = time.monotonic(), round(SCRAPE_S / TURN_S)
    for turn in track(range(stretches * STRETCH), sight.name):
        server.process.send_signal(signal.SIGUSR1)
        if sight.scraped and sees(turn) and turn // 2 % scrape_every == 0:
            with urllib.request.urlopen(f"{server.address}/metrics", timeout=10) as page:
                page.read()
        time.sleep(max(0.0, began_s + (turn + 1) * TURN_S - time.monotonic()))
    server.process.send_signal(signal.SIGUSR1)


@dataclass
class Collector:
    """Takes spans and throws them away."""

    address: str = ""
    predictions: int = 0
    """That had a span."""


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.predictions += body.count(b"evalmode.request.id")
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
