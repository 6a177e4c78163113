"""One run: a service under everything, and what came of it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from rich.table import Table

from benchmarks.chaos.chaos import prepared
from benchmarks.chaos.client import Drawn, Outcome, send_all
from benchmarks.chaos.requests import attempt
from benchmarks.chaos.server import Held, serving
from benchmarks.soak.disturbances import (
    BURST_EVERY_S,
    KILL_EVERY_S,
    RELOAD_S,
    SAMPLE_S,
    Bursts,
    During,
    Killing,
    Sampling,
    Turning,
)

KILL_S = 3.0
"""After a kill, what was cut short belongs to it."""

CONNECTIONS = 20
SLOPE_MB = 1.0
"""The most that memory may grow in 100,000 answers."""

CUT_SHORT = ("closed", "without an answer", "not answered within", "Connection")


@final
class Failures(list[str]):
    """With the time of each."""

    def __init__(self) -> None:
        super().__init__()
        self.at_s: list[float] = []

    def append(self, failure: str) -> None:
        super().append(failure)
        self.at_s.append(time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of it."""

    minutes: float
    outcome: Outcome
    lost: Sequence[str]
    """Not answered as they should be, or not at all, and not because of a kill."""
    cut: int
    """By a kill."""
    kills: int
    turned: Counter[str]
    wrong: Sequence[str]
    bursts: Counter[str]
    held: Sequence[tuple[int, Held]]

    @property
    def answers(self) -> int:
        mixed = sum(sum(counted.values()) for counted in self.outcome.statuses.values())
        return mixed + self.turned.total() + self.bursts.total()

    @property
    def slope_mb(self) -> float:
        """Megabytes in 100,000 answers, by least squares over the second half: workers that were killed begin anew."""
        half = self.held[len(self.held) // 2 :]
        if len(half) < 3:
            return 0.0
        answers, memory_mb = np.array([[count, held.memory_mb] for count, held in half]).T
        return float(np.polyfit(answers, memory_mb, 1)[0] * 100_000)

    @property
    def faults(self) -> list[str]:
        found = [*self.wrong, *self.lost]
        if self.slope_mb > SLOPE_MB and self.answers > 100_000:
            found.append(f"memory grew by {self.slope_mb:.2f} MB in 100,000 answers")
        server_errors = [status for status in (*self.turned, *self.bursts) if status.startswith("5")]
        return [*found, *(f"a burst or a reload was answered {status}" for status in server_errors)]

    def table(self) -> Table:
        first, last = self.held[0][1], self.held[-1][1]
        statuses = sum(self.outcome.statuses.values(), Counter[str]()) + self.bursts
        table = Table("what", "how many", title=f"{self.minutes:g} minutes of everything")
        for what, figure in (
            ("answers", f"{self.answers:,}"),
            ("by status", ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items()))),
            ("wrong answers", f"{len(self.wrong)}"),
            ("lost", f"{len(self.lost)}"),
            (f"cut short by {self.kills} kills", f"{self.cut}"),
            ("answers while versions came", ", ".join(f"{status}: {n:,}" for status, n in self.turned.items())),
            ("memory", f"{first.memory_mb:.0f} -> {last.memory_mb:.0f} MB; {self.slope_mb:+.2f} MB in 100,000 answers"),
            ("descriptors", f"{first.descriptors} -> {last.descriptors}"),
            ("threads", f"{first.threads} -> {last.threads}"),
        ):
            table.add_row(what, figure)
        return table


def soak(folder: Path, *, minutes: float, seed: int, workers: int = 2) -> Report:
    """
    Args:
        folder: empty; for the models and the log.
    """
    root = folder / "models"
    models = prepared(root)
    turning = Turning(root)
    outcome, until_s = Outcome(failures=Failures()), time.monotonic() + 60 * minutes

    def drawn() -> Iterator[Drawn]:
        for number in itertools.count():
            if time.monotonic() > until_s:
                return
            yield number, *attempt(seed, number, models)

    with serving(root, workers=workers, log=folder / "log") as server:
        killing, bursts = Killing(server), Bursts(server.port)
        mixed = outcome.statuses
        sampling = Sampling(server, lambda: sum(map(Counter.total, [*mixed.values(), turning.answers, bursts.answers])))
        during = During()
        during.always(lambda: turning.ask(server.port))
        during.every(RELOAD_S, turning.add)
        during.every(KILL_EVERY_S, killing.one)
        during.every(BURST_EVERY_S, bursts.one)
        during.every(SAMPLE_S, sampling.one)
        send_all(server.port, drawn(), connections=CONNECTIONS, outcome=outcome)
        during.end()
        server.held_when(lambda held: not held.connections)
        sampling.one()
    assert isinstance(outcome.failures, Failures)

    def by_a_kill(at_s: float) -> bool:
        return any(0 <= at_s - kill_s < KILL_S for kill_s in killing.at_s)

    timed = list(zip(outcome.failures, outcome.failures.at_s, strict=True))
    lost = [failure for failure, at_s in timed if not (by_a_kill(at_s) and any(word in failure for word in CUT_SHORT))]
    elsewhere = [*turning.cut_s, *bursts.cut_s]
    unanswered = sum(not by_a_kill(at_s) for at_s in elsewhere)
    lost += ["a burst or a question while versions came was not answered"] * unanswered
    return Report(
        minutes=minutes,
        outcome=outcome,
        lost=lost,
        cut=len(timed) + len(elsewhere) - len(lost),
        kills=len(killing.at_s),
        turned=turning.answers,
        wrong=turning.wrong,
        bursts=bursts.answers,
        held=sampling.held,
    )
