"""One run: a service under everything, and what came of it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import numpy as np
from rich.table import Table

from benchmarks.chaos.chaos import GROWTH_MB, POOL_THREADS, prepared
from benchmarks.chaos.client import Cause, Drawn, Failure, Outcome, send_all
from benchmarks.chaos.requests import attempt
from benchmarks.chaos.server import LIMITS, Held, Holding, serving
from benchmarks.soak.disturbances import (
    BURST_EVERY_S,
    KILL_EVERY_S,
    RELOAD_S,
    SAMPLE_S,
    Bursts,
    During,
    Killing,
    Sample,
    Sampling,
    Turning,
)

KILL_S = 3.0
"""After a kill, what was not answered belongs to it."""

LAST_VERSION_S = 60.0
"""So long may the last version be tried, in a process of its own, on a machine that has other work too."""

CONNECTIONS = 20
CERTAIN = 4.0
"""Standard errors by which a growth has to be beyond what is allowed: what a process holds goes up and down by 3 MB,
and several are judged in each of many runs."""

SLOPE_MB = 1.0
"""The most that a process may grow in 100,000 requests to the service, where there were so many; else `GROWTH_MB`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """A process that was there all the last third, before which each had a while without kills to settle."""

    role: str
    begun: Holding
    """Before the first request: it, or another in its role where it took the place of one that was killed."""
    settled: Holding
    end: Holding
    """After the last answer, with no connection left."""
    requests: int
    """To the service in that time."""
    slope_mb: float
    """Of its own memory in 100,000 of them, by least squares."""
    error_mb: float
    """The standard error of that: each version that is admitted takes memory for a while, and gives it back."""

    @property
    def row(self) -> str:
        return (
            f"{self.settled.own_mb:.1f} -> {self.end.own_mb:.1f} MB of its own, "
            f"{self.slope_mb:+.2f} ± {self.error_mb:.2f} in 100,000 of "
            f"{self.requests:,} requests; descriptors {self.begun.descriptors} -> {self.end.descriptors}; "
            f"threads {self.begun.threads} -> {self.end.threads}"
        )

    @property
    def faults(self) -> list[str]:
        found = []
        growth_mb, allowed_mb = self.slope_mb - CERTAIN * self.error_mb, SLOPE_MB
        if self.requests < 100_000:
            growth_mb, allowed_mb = self.end.own_mb - self.settled.own_mb, GROWTH_MB
        if growth_mb > allowed_mb:
            found.append(f"a {self.role} grew by {growth_mb:.2f} MB: {self.row}")
        if self.end.descriptors > self.begun.descriptors:
            found.append(f"a {self.role} has {self.end.descriptors} descriptors, {self.begun.descriptors} at the start")
        if self.end.threads > self.begun.threads + POOL_THREADS:
            found.append(f"a {self.role} has {self.end.threads} threads, {self.begun.threads} at the start")
        return found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of it."""

    minutes: float
    statuses: Counter[str]
    """Of every request; `closed`, `silent` and `left` among them."""
    turned: Counter[str]
    """Of those that were sent while versions came."""
    burst: Counter[str]
    """Of those that came in bursts."""
    failures: Sequence[Failure]
    killed_s: Sequence[float]
    grown: Sequence[Grown]

    @property
    def requests(self) -> int:
        return self.statuses.total()

    @property
    def cut(self) -> list[Failure]:
        """A process that is killed cannot answer what it had taken."""
        return [
            failure
            for failure in self.failures
            if failure.cause is Cause.SILENCE
            and any(0 <= failure.at_s - killed_s < KILL_S for killed_s in self.killed_s)
        ]

    def by_cause(self, cause: Cause) -> list[str]:
        """What was said of those that no kill explains."""
        cut = self.cut
        return [failure.said for failure in self.failures if failure.cause is cause and failure not in cut]

    @property
    def wrong(self) -> list[str]:
        return self.by_cause(Cause.WRONG)

    @property
    def lost(self) -> list[str]:
        return self.by_cause(Cause.SILENCE)

    @property
    def faults(self) -> list[str]:
        """Everything that is not as it should be."""
        grown = [fault for one in self.grown for fault in one.faults]
        return [*self.wrong, *self.lost, *self.by_cause(Cause.STATUS), *grown]

    def table(self) -> Table:
        table = Table("what", "how much", title=f"{self.minutes:g} minutes of everything")
        for what, figure in (
            ("requests", f"{self.requests:,}"),
            ("  by status", _counted(self.statuses)),
            ("  while versions came", _counted(self.turned)),
            ("  in bursts", _counted(self.burst)),
            ("wrong answers", f"{len(self.wrong)}"),
            ("lost: no answer", f"{len(self.lost)}"),
            ("an unexpected status", f"{len(self.by_cause(Cause.STATUS))}"),
            (f"no answer, by {len(self.killed_s)} kills", f"{len(self.cut)}"),
            *((one.role, one.row) for one in self.grown),
        ):
            table.add_row(what, figure)
        return table

    def summary(self) -> dict[str, object]:
        return {
            "minutes": self.minutes,
            "requests": self.requests,
            "wrong": len(self.wrong),
            "lost": len(self.lost),
            "unexpected": len(self.by_cause(Cause.STATUS)),
            "kills": len(self.killed_s),
            "cut_by_kills": len(self.cut),
            "faults": self.faults,
            "by_status": dict(sorted(self.statuses.items())),
            "processes": [asdict(one) for one in self.grown],
        }


def _counted(statuses: Counter[str]) -> str:
    return ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items()))


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Of the line of least squares, and its standard error, which two points have none of."""
    line = np.polyfit(x, y, 1)
    if len(x) < 3:
        return float(line[0]), 0.0
    variance = np.square(np.asarray(y) - np.polyval(line, x)).sum() / (len(x) - 2)
    return float(line[0]), float(np.sqrt(variance / np.square(np.asarray(x) - np.mean(x)).sum()))


def grown(samples: Sequence[Sample], *, since_s: float, workers: int) -> list[Grown]:
    """Each process that is in every sample since then.

    Args:
        samples: the first of them before the first request, the last after the last answer.
    """
    begun, late = _roles(samples[0].held, workers), [sample for sample in samples if sample.at_s >= since_s]
    by_pid = [{one.pid: one for one in sample.held.each} for sample in late]
    found = []
    for role, one in _roles(late[-1].held, workers):
        if not all(one.pid in held for held in by_pid):
            continue
        lives = [held[one.pid] for held in by_pid]
        slope_mb, error_mb = slope([sample.requests / 100_000 for sample in late], [life.own_mb for life in lives])
        found.append(
            Grown(
                role=role,
                begun=next((before for role_before, before in begun if role_before == role), one),
                settled=lives[0],
                end=one,
                requests=late[-1].requests - late[0].requests,
                slope_mb=slope_mb,
                error_mb=error_mb,
            )
        )
    return found


def _roles(held: Held, workers: int) -> list[tuple[str, Holding]]:
    """One worker is alone; of several the spare holds least, as it has no models."""
    if workers == 1:
        return [("worker", one) for one in held.each]
    supervisor, *below = held.each
    below = sorted(below, key=lambda one: -one.own_mb)
    return [
        ("supervisor", supervisor),
        *(("worker", one) for one in below[:workers]),
        *(("spare", one) for one in below[workers:]),
    ]


def soak(folder: Path, *, minutes: float, seed: int, workers: int = 2) -> Report:
    """
    Args:
        folder: empty; for the models and the log.
    """
    root = folder / "models"
    models = prepared(root)
    turning, bursts = Turning(root), Bursts(root)
    outcome = Outcome()

    with serving(root, workers=workers, log=folder / "log", options=LIMITS) as server:
        began_s = time.monotonic()
        half_s, settled_s, until_s = (began_s + share * 60 * minutes for share in (1 / 2, 2 / 3, 1))

        def drawn() -> Iterator[Drawn]:
            for number in itertools.count():
                if time.monotonic() > until_s:
                    return
                yield number, *attempt(seed, number, models)

        killing, mixed = Killing(server, until_s=half_s), outcome.statuses
        sampling = Sampling(server, lambda: sum(map(Counter.total, [*mixed.values(), turning.answers, bursts.answers])))
        sampling.one()
        during = During()
        during.always(lambda: turning.ask(server.port))
        during.every(RELOAD_S, turning.add)
        during.every(KILL_EVERY_S, killing.one)
        during.every(BURST_EVERY_S, lambda: bursts.one(server.port))
        during.every(SAMPLE_S, sampling.one)
        send_all(server.port, drawn(), connections=CONNECTIONS, outcome=outcome)
        during.end()
        most = sampling.samples[0].held.descriptors
        server.held_when(lambda held: not held.connections and held.descriptors <= most, within_s=LAST_VERSION_S)
        sampling.one()
    return Report(
        minutes=minutes,
        statuses=sum(mixed.values(), turning.answers + bursts.answers),
        turned=turning.answers,
        burst=bursts.answers,
        failures=[*outcome.failures, *turning.failures, *bursts.failures],
        killed_s=killing.at_s,
        grown=grown(sampling.samples, since_s=settled_s, workers=workers),
    )
