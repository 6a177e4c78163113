"""One model: its capacity, then as much as that, then ten times as much."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.table import Table

from benchmarks.chaos.requests import DENSE, INFER_PATH, answer, http, infer
from benchmarks.chaos.server import Server, serving
from benchmarks.graphs import dense
from benchmarks.overload.client import Answers, Question, ask_again, ask_when_it_is_time
from benchmarks.soak.disturbances import During
from service.coalescing import ALWAYS_WAIT
from service.protocol import v2
from service.repository import load
from service.runtime import place
from service.settings import Settings

TIMES = 10
CAPACITY_S = 10.0
MOST_RATIO = 2.0
GROWTH_MB = 32.0
"""What an allocator may keep; every run has thousands of requests that are too many."""

MOST_LATE_S = 0.05
"""A client whose p99 of being late is more has not offered what it should have."""

FEATURES, WIDTH, QUESTIONS = 16, 1024, 64
SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A chain of dense layers, a tenth of a millisecond each for one row, or more."""

    title: str
    layers: int
    max_batch_rows: int


MODELS = (
    Model(title="a row at a time", layers=100, max_batch_rows=1),
    Model(title="batches", layers=250, max_batch_rows=64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests at random times, and what came of them."""

    times: int
    """The capacity."""
    offered_per_s: float
    seconds: float
    answers: Answers
    memory_mb: Sequence[float]
    """Before, and then as time went by."""

    @property
    def p50_s(self) -> float:
        return _percentile(self.answers.latency_s, 50)

    @property
    def p99_s(self) -> float:
        return _percentile(self.answers.latency_s, 99)

    @property
    def growth_mb(self) -> float:
        return max(self.memory_mb) - self.memory_mb[0]

    @property
    def faults(self) -> list[str]:
        found = [f"{count} were answered {status}" for status, count in self.answers.statuses.items()
                 if status not in ("200", "429")]  # fmt: skip
        if self.answers.wrong:
            found.append(f"{self.answers.wrong} answers were wrong")
        if min(self.answers.retry_after_s, default=1) < 1:
            found.append("a 429 had no Retry-After of a second or more")
        if self.growth_mb > GROWTH_MB:
            found.append(f"memory grew by {self.growth_mb:.0f} MB")
        if (late_s := _percentile(self.answers.late_s, 99)) > MOST_LATE_S:
            found.append(f"the client was {late_s * 1e3:.0f} ms late (p99): less was offered than planned")
        return [f"at {self.times} times the capacity: {fault}" for fault in found]

    def summary(self) -> dict[str, Any]:
        answers = self.answers
        return {
            "times": self.times,
            "offered_per_s": round(self.offered_per_s, 1),
            "seconds": self.seconds,
            "statuses": dict(answers.statuses),
            "accepted_per_s": round(answers.accepted_per_s, 1),
            "p50_ms": round(self.p50_s * 1e3, 1),
            "p99_ms": round(self.p99_s * 1e3, 1),
            "queue_p99_ms": round(_percentile(answers.queue_s, 99) * 1e3, 1),
            "retry_after_s": sorted(set(answers.retry_after_s)),
            "client_late_p99_ms": round(_percentile(answers.late_s, 99) * 1e3, 2),
            "memory_mb": [round(self.memory_mb[0], 1), round(max(self.memory_mb), 1)],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of one model."""

    model: Model
    capacity_per_s: float
    at_capacity: Load
    overload: Load
    afterwards: Answers
    """Of one more request."""

    @property
    def ratio(self) -> float:
        """Of the p99 of those that were accepted."""
        return self.overload.p99_s / self.at_capacity.p99_s

    @property
    def faults(self) -> list[str]:
        found = [*self.at_capacity.faults, *self.overload.faults]
        if not self.ratio <= MOST_RATIO:
            found.append(f"the p99 at {TIMES} times the capacity is {self.ratio:.2f} times the one at capacity")
        return [f"{self.model.title}: {fault}" for fault in found]

    def summary(self) -> dict[str, Any]:
        return {
            "model": self.model.title,
            "capacity_per_s": round(self.capacity_per_s, 1),
            "ratio": round(self.ratio, 2),
            "loads": [self.at_capacity.summary(), self.overload.summary()],
        }


def overload(folder: Path, model: Model, *, seconds: float, max_queue_s: float, seed: int = 1) -> Report:
    """
    Args:
        folder: empty; for the model and the log.
        seconds: of each load.
        max_queue_s: the server's.
    """
    path = folder / "models" / DENSE / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(dense([FEATURES, *[WIDTH] * model.layers, 4]), path)
    questions = _questions(folder / "models")
    options = ["--threads", "1", "--max-batch-rows", str(model.max_batch_rows), "--max-queue-s", str(max_queue_s)]
    with serving(folder / "models", workers=1, log=folder / "log", options=options) as server:
        warm = ask_again(server.port, questions, callers=ALWAYS_WAIT, seconds=2)
        saturated = ask_when_it_is_time(
            server.port, questions, per_s=2 * warm.accepted_per_s, seconds=min(CAPACITY_S, seconds), seed=seed
        )
        capacity_per_s = saturated.accepted_per_s
        loads = [
            _load(server, questions, times=times, capacity_per_s=capacity_per_s, seconds=seconds, seed=seed + times)
            for times in (1, TIMES)
        ]
        afterwards = ask_again(server.port, questions, callers=1, seconds=0)
    return Report(
        model=model,
        capacity_per_s=capacity_per_s,
        at_capacity=loads[0],
        overload=loads[1],
        afterwards=afterwards,
    )


def table(reports: Sequence[Report]) -> Table:
    shown = Table("model", "load", "offered", "200", "429", "p50", "p99", "Retry-After", "memory", "client late, p99")
    for report in reports:
        for load_ in (report.at_capacity, report.overload):
            said = load_.summary()
            shown.add_row(
                f"{report.model.title}, {report.capacity_per_s:.0f}/s",
                f"{load_.times} x",
                f"{said['offered_per_s']:,.0f}/s",
                f"{said['statuses'].get('200', 0):,} ({said['accepted_per_s']:.0f}/s)",
                f"{said['statuses'].get('429', 0):,}",
                f"{said['p50_ms']:,.0f} ms",
                f"{said['p99_ms']:,.0f} ms",
                ", ".join(f"{it} s" for it in said["retry_after_s"]),
                f"{said['memory_mb'][0]:.0f} -> {said['memory_mb'][1]:.0f} MB",
                f"{said['client_late_p99_ms']:.1f} ms",
            )
        shown.add_row("", "", "", "", "", "p99", f"x {report.ratio:.2f}", "", "", "", end_section=True)
    return shown


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else 0.0


def _load(
    server: Server, questions: Sequence[Question], *, times: int, capacity_per_s: float, seconds: float, seed: int
) -> Load:
    memory_mb = [server.held().memory_mb]
    during = During()
    during.every(SAMPLE_S, lambda: memory_mb.append(server.held().memory_mb))
    per_s = times * capacity_per_s
    answers = ask_when_it_is_time(server.port, questions, per_s=per_s, seconds=seconds, seed=seed)
    during.end()
    return Load(times=times, offered_per_s=per_s, seconds=seconds, answers=answers, memory_mb=memory_mb)


def _questions(models: Path) -> list[Question]:
    """Rows, each with the answer that the model gives in this process."""
    live = load(models, place("cpu"), Settings(threads=1, max_batch_rows=1)).live(DENSE)
    rows = np.random.default_rng(3).normal(0, 1, (QUESTIONS, 1, FEATURES)).astype(np.float32)
    bodies = [json.dumps(infer(row)).encode() for row in rows]
    return [Question(http(INFER_PATH, body), answer(live, v2.parse, body)) for body in bodies]
