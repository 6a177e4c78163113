"""The limit of computing: `session.run` without a server, one sample after the other."""

from __future__ import annotations

import statistics
import time

from benchmarks.serving.peers.shared.network import Network
from benchmarks.serving.workloads import Workload, tensors
from service.cpus import usable_cpus

WARM_UP_RUNS = 20


def threads() -> tuple[int, ...]:
    """One, and as many as evalmode takes by itself."""
    return tuple(sorted({1, usable_cpus()}))


def timed(workload: Workload, *, threads: int, seconds: float) -> dict[str, float]:
    """Runs a second, and the median and 99th percentile of one run in ms."""
    network = Network(workload.network, threads=threads)
    samples = tensors(workload)
    for i in range(WARM_UP_RUNS):
        network.run(samples[i % len(samples)])
    taken_s: list[float] = []
    began = last = time.perf_counter()
    while last - began < seconds:
        network.run(samples[len(taken_s) % len(samples)])
        now = time.perf_counter()
        taken_s.append(now - last)
        last = now
    return {
        "runs_per_s": len(taken_s) / (last - began),
        "p50_ms": statistics.median(taken_s) * 1e3,
        "p99_ms": statistics.quantiles(taken_s, n=100)[98] * 1e3,
    }
