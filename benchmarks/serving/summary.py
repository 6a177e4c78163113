"""Medians over rounds, and ratios within a round: what can be said of what was measured.

Rule 1: a ratio divides two figures of the same round, and of two servers their shares of the echo beside each; then the
median over rounds is taken, and least and most kept.
Rule 2: a cell that was invalid in any round has no figures; the others do not speak for it.
Rule 3: nothing here reads a clock or a file.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.serving.records import Cell, Measured, Run

Figure = Callable[[Cell], float]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and the most."""

    median: float
    least: float
    most: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def spread(values: Iterable[float]) -> Spread | None:
    """Of at least one value."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found), len(found)) if found else None


def requests_per_s(cell: Cell) -> float:
    return cell.requests_per_s


@dataclass(frozen=True, slots=True)
class Summary:
    """Questions to what was measured."""

    measured: Measured

    def runs(self, workload: str, server: str) -> list[Run]:
        return [run for run in self.measured.runs if run.workload == workload and run.server == server]

    def cells(self, workload: str, server: str, connections: int) -> dict[int, Cell]:
        """Each round's cell."""
        return {
            run.round: cell
            for run in self.runs(workload, server)
            for cell in run.cells
            if cell.connections == connections
        }

    def invalid(self, workload: str, server: str, connections: int) -> str | None:
        """Why a cell has no figures: in how many rounds, and what was seen."""
        cells = self.cells(workload, server, connections).values()
        rounds = sum(not cell.valid for cell in cells)
        if not rounds:
            return None
        return f"invalid in {rounds} of {len(cells)}: {sum(cell.errors for cell in cells):,} errors"

    def figure(self, workload: str, server: str, connections: int, figure: Figure) -> Spread | None:
        """None: it was not measured, or not without errors."""
        if self.invalid(workload, server, connections):
            return None
        return spread(figure(cell) for cell in self.cells(workload, server, connections).values())

    def ratio(self, workload: str, server: str, other: str, connections: int) -> Spread | None:
        """Requests per second of one server by those of another, at the same speed of the machine."""
        if self.invalid(workload, server, connections) or self.invalid(workload, other, connections):
            return None
        ours, theirs = (self.cells(workload, name, connections) for name in (server, other))
        shares = [(ours[i].share, theirs[i].share) for i in ours.keys() & theirs.keys()]
        return spread(one / another for one, another in shares if one is not None and another is not None)

    def share(self, workload: str, server: str, connections: int) -> Spread | None:
        """Requests per second by those of the echo beside it."""
        if self.invalid(workload, server, connections):
            return None
        cells = self.cells(workload, server, connections).values()
        return spread(cell.share for cell in cells if cell.share is not None)

    def growth(self, workload: str, server: str, fewer: int, more: int, figure: Figure) -> Spread | None:
        """A figure at more connections by the same at fewer."""
        if self.invalid(workload, server, fewer) or self.invalid(workload, server, more):
            return None
        before, after = (self.cells(workload, server, connections) for connections in (fewer, more))
        return spread(figure(after[i]) / figure(before[i]) for i in before.keys() & after.keys())

    def first_answer_s(self, workload: str, server: str) -> Spread | None:
        return spread(run.first_answer_s for run in self.runs(workload, server) if run.first_answer_s is not None)

    def failures(self, workload: str, server: str) -> list[str]:
        """Each reason once."""
        return list(dict.fromkeys(run.failure for run in self.runs(workload, server) if run.failure))

    def strangers_cpus(self) -> Spread | None:
        """How many CPUs were busy with something else while cells were measured."""
        return spread(cell.strangers_cpus for run in self.measured.runs for cell in run.cells)

    def in_process_p50_ms(self, workload: str) -> dict[int, float]:
        """For each round the faster of one thread and all: what a server is held against."""
        rounds: dict[int, float] = {}
        for timed in self.measured.in_process:
            if timed.workload == workload:
                rounds[timed.round] = min(timed.p50_ms, rounds.get(timed.round, timed.p50_ms))
        return rounds

    def beyond_in_process_ms(self, workload: str, server: str) -> Spread | None:
        """Median latency of one connection less that of `session.run`."""
        return self._beyond(workload, server, self.in_process_p50_ms(workload))

    def beyond_echo_ms(self, workload: str, server: str, echo: str) -> Spread | None:
        """The same less what the echo takes for as large a request: without transport."""
        echoed, alone = self.cells(workload, echo, 1), self.in_process_p50_ms(workload)
        return self._beyond(workload, server, {i: alone[i] + echoed[i].p50_ms for i in alone.keys() & echoed.keys()})

    def _beyond(self, workload: str, server: str, base_ms: dict[int, float]) -> Spread | None:
        if self.invalid(workload, server, 1):
            return None
        cells = self.cells(workload, server, 1)
        return spread(cells[i].p50_ms - base_ms[i] for i in cells.keys() & base_ms.keys())
