"""One run: a server, everything that is sent to it, and what is left of it."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from rich.table import Table

from benchmarks.chaos.client import Drawn, Outcome, send_all
from benchmarks.chaos.requests import DENSE, KINDS, NAMED, Models, attempt
from benchmarks.chaos.server import Held, serving
from benchmarks.serving import networks
from service.repository import load
from service.runtime import place
from service.settings import Settings

SHIPPED = Path(__file__).parents[2] / "models" / NAMED

WARM_UP = 500
"""Requests before the state is taken that the end is held against: pools of threads and of memory are then full."""

GROWTH_MB = 32.0
"""For each process, what an allocator may keep; a leak of 10 kB for each of 10,000 requests is three times that."""

OWN_THREADS = 8
"""Of a process: one for what is large, one for each model, of which a soak has four, and those that come and go: of
versions that were replaced, and whoever looks at the folder. One left behind at each of dozens of loads is seen."""

POOL_THREADS = min(32, (os.cpu_count() or 1) + 4) + OWN_THREADS
"""For each process, that it may not have needed before: as many as asyncio's pool has, and its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of it."""

    workers: int
    seed: int
    seconds: float
    outcome: Outcome
    before: Held
    after: Held
    logged: Sequence[str]
    """What the server had to say about it that is not about a request."""

    @property
    def faults(self) -> list[str]:
        """Everything that is not as it should be."""
        before, after = self.before, self.after
        found = [failure.said for failure in self.outcome.failures]
        found += [
            f"{name}: {getattr(before, name)} before, {getattr(after, name)} afterwards"
            for name, more in (
                ("processes", 0),
                ("descriptors", 0),
                ("connections", 0),
                ("threads", POOL_THREADS * after.processes),
            )
            if getattr(after, name) > getattr(before, name) + more
        ]
        if after.memory_mb > before.memory_mb + GROWTH_MB * after.processes:
            found.append(f"memory: {before.memory_mb:.0f} MB before, {after.memory_mb:.0f} MB afterwards")
        return [*found, *(f"the server logged: {line}" for line in self.logged)]

    def table(self) -> Table:
        statuses = sorted({status for counted in self.outcome.statuses.values() for status in counted})
        held = "; ".join(
            f"{name} {getattr(self.before, name)} -> {getattr(self.after, name)}"
            for name in ("descriptors", "threads", "connections")
        )
        memory = f"memory {self.before.memory_mb:.0f} -> {self.after.memory_mb:.0f} MB"
        table = Table(
            title=f"seed {self.seed}, workers: {self.workers}",
            caption=f"{held}; {memory}; {self.seconds:.0f} s; faults: {len(self.faults)}",
        )
        table.add_column("what was sent")
        for status in statuses:
            table.add_column(status, justify="right")
        for kind in KINDS:
            counted = self.outcome.statuses.get(kind, Counter())
            table.add_row(kind, *(str(counted[status] or "") for status in statuses))
        return table

    def summary(self) -> dict[str, object]:
        total = sum(sum(counted.values()) for counted in self.outcome.statuses.values())
        return {
            "workers": self.workers,
            "seed": self.seed,
            "answers": total,
            "seconds": round(self.seconds, 1),
            "faults": len(self.faults),
            "memory_growth_mb": round(self.after.memory_mb - self.before.memory_mb, 1),
        }


def chaos(folder: Path, *, requests: int, connections: int, seed: int, workers: int) -> Report:
    """Serve two models, and send them everything.

    Args:
        folder: empty; for the models and the log.
    """
    root = folder / "models"
    models = prepared(root)

    def drawn(numbers: range) -> Iterator[Drawn]:
        for number in numbers:
            yield number, *attempt(seed, number, models)

    with serving(root, workers=workers, log=folder / "log") as server:
        send_all(server.port, drawn(range(-WARM_UP, 0)), connections=connections)
        before = server.held_when(lambda held: not held.connections)
        started_s = time.perf_counter()
        outcome = send_all(server.port, drawn(range(requests)), connections=connections)
        seconds = time.perf_counter() - started_s
        after = server.held_when(lambda held: not held.connections and held.descriptors <= before.descriptors)
    said = (folder / "log").read_text(errors="replace").splitlines()
    logged = [line for line in said if any(word in line for word in ("Traceback", "Error", "ERROR", "exception"))]
    return Report(
        workers=workers, seed=seed, seconds=seconds, outcome=outcome, before=before, after=after, logged=logged
    )


def prepared(root: Path) -> Models:
    """A repository of the two models at `root`, and the models in this process."""
    shutil.copytree(SHIPPED, root / NAMED)
    (root / DENSE / "1").mkdir(parents=True)
    onnx.save(networks.dense(), root / DENSE / "1" / "model.onnx")
    here = load(root, place("cpu"), Settings())
    return Models(named=here.live(NAMED), dense=here.live(DENSE))
