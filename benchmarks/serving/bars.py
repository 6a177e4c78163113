"""The bars that were set before anything was measured, and whether each is met.

Rule 1: a bar is judged by the median over rounds of ratios to the echo beside; nothing is rounded in its favour.
Rule 2: what was not measured, or not without errors, is neither met nor missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.serving.installing import EVALMODE
from benchmarks.serving.records import Cell
from benchmarks.serving.servers import ECHO, FASTAPI
from benchmarks.serving.summary import Spread, Summary, requests_per_s
from benchmarks.serving.workloads import CROWD, USUAL

AT_LEAST = (  # workload, connections, against, ratio
    ("dense", 1, ECHO, 0.65),
    ("dense", 32, ECHO, 0.60),
    ("dense", 32, FASTAPI, 3.5),
    ("credit", 32, ECHO, 0.45),
)
BEYOND_IN_PROCESS_MS = {"image-binary": 1.5, "image-json": 12.0}
LEAST_OF_THE_USUAL = 0.8
"""Throughput under the crowd by that under the usual number of connections."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar, and what was found."""

    bar: str
    found: str
    met: bool | None
    """None: not measured."""

    @property
    def word(self) -> str:
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]


def verdicts(summary: Summary, peers: Sequence[str]) -> Iterator[Verdict]:
    """Every bar.

    Args:
        peers: the servers that evalmode is compared with, each with every setting.
    """
    for workload, connections, other, least in AT_LEAST:
        ratio = (
            summary.share(workload, EVALMODE, connections)
            if other == ECHO
            else summary.ratio(workload, EVALMODE, other, connections)
        )
        bar = f"{workload}, {_connections(connections)}: at least {least:.2f} x {other}"
        yield Verdict(bar, _shown(ratio, "x"), _met(ratio, least=least))
    for connections in (1, USUAL):
        yield _ahead(summary, peers, connections)
    for workload, most in BEYOND_IN_PROCESS_MS.items():
        beyond = summary.beyond_in_process_ms(workload, EVALMODE)
        without_transport = summary.beyond_echo_ms(workload, EVALMODE, ECHO)
        found = _shown(beyond, "ms") + (f"; beyond the echo too {without_transport} ms" if without_transport else "")
        bar = f"{workload}, 1 connection: at most {most} ms beyond `session.run` in process"
        yield Verdict(bar, found, _met(beyond, most=most))
    yield from _crowd(summary)


def _ahead(summary: Summary, peers: Sequence[str], connections: int) -> Verdict:
    """Of the best setting of every peer."""
    ratios = {peer: summary.ratio("dense", EVALMODE, peer, connections) for peer in peers}
    known = {peer: ratio for peer, ratio in ratios.items() if ratio}
    bar = f"dense, {_connections(connections)}: ahead of every peer with its best setting"
    if not known:
        return Verdict(bar, "not measured", None)
    nearest = min(known, key=lambda peer: known[peer].median)
    found = f"{known[nearest]} x {nearest}, the nearest"
    if missing := [peer for peer in peers if peer not in known]:
        found += f"; without a figure: {', '.join(missing)}"
    return Verdict(bar, found, known[nearest].median > 1)


def _crowd(summary: Summary) -> Iterator[Verdict]:
    throughput = summary.growth("dense", EVALMODE, USUAL, CROWD, requests_per_s)
    bar = f"dense, {CROWD} connections: throughput at least {LEAST_OF_THE_USUAL} x that at {USUAL}"
    yield Verdict(bar, _shown(throughput, "x"), _met(throughput, least=LEAST_OF_THE_USUAL))
    p99 = summary.growth("dense", EVALMODE, USUAL, CROWD, _p99_ms)
    bar = f"dense, {CROWD} connections: p99 grows no faster than the connections, {CROWD // USUAL} x"
    yield Verdict(bar, _shown(p99, "x"), _met(p99, most=CROWD / USUAL))


def _met(found: Spread | None, *, least: float = -math.inf, most: float = math.inf) -> bool | None:
    return least <= found.median <= most if found else None


def _p99_ms(cell: Cell) -> float:
    return cell.p99_ms


def _shown(found: Spread | None, unit: str) -> str:
    return f"{found} {unit}" if found else "not measured"


def _connections(count: int) -> str:
    return f"{count} connection{'' if count == 1 else 's'}"
