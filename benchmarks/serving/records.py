"""What was measured, as it came, and the file that it is kept in.

Rule 1: the file is written aside and renamed: whoever reads it finds all of an earlier state, or all of a later one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One server under one number of connections."""

    connections: int
    requests: int
    requests_per_s: float
    echo_per_s: float | None
    """Of the echo at as many connections: the mean of just before and just after. None: it did not answer all."""
    p50_ms: float
    p99_ms: float
    p999_ms: float
    cpu_s_per_1000: float
    memory_mb: float
    strangers_cpus: float
    """CPUs that were busy with neither the server nor wrk: of a quiet machine near 0."""
    errors: int
    """Answers that were not 2xx, and socket errors."""

    @property
    def share(self) -> float | None:
        """Of what the echo did beside it."""
        return None if self.echo_per_s is None else self.requests_per_s / self.echo_per_s

    @property
    def valid(self) -> bool:
        return self.requests > 0 and not self.errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One server in one round."""

    workload: str
    round: int
    server: str
    first_answer_s: float | None = None
    cells: tuple[Cell, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcess:
    """`session.run` without a server, one sample at a time, in one round."""

    workload: str
    round: int
    threads: int
    runs_per_s: float
    p50_ms: float
    p99_ms: float


@dataclass(slots=True, kw_only=True)
class Measured:
    """Everything, as it came."""

    about: dict[str, Any]
    """Date, versions, settings, and what could not be installed."""
    runs: list[Run] = field(default_factory=list)
    in_process: list[InProcess] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """What is measured so far."""
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".partial")
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(aside, file)

    @classmethod
    def load(cls, file: Path) -> Self:
        read = json.loads(file.read_text(encoding="utf-8"))
        runs = [Run(**{**run, "cells": tuple(Cell(**cell) for cell in run["cells"])}) for run in read["runs"]]
        return cls(about=read["about"], runs=runs, in_process=[InProcess(**it) for it in read["in_process"]])
