"""What one process reads off itself when it is asked: its counts, its queues, its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import ProcessCollector

from service import logs
from service.readings import Reading

if TYPE_CHECKING:
    from service.repository import Repository  # and with it the engine, which a supervisor does without

_process = ProcessCollector(registry=None)


def reading_of(repository: Repository) -> Reading:
    """Of a process that serves these models."""
    read: Reading = [*repository.counts.reading(), *process_reading(), ("evalmode_workers", (), 1)]
    answers = all(live.canary.answers for live in repository.models)
    read.append(("evalmode_ready", (), int(repository.ready and answers)))
    for live in repository.answering:
        read.append(("evalmode_queue_rows", (live.name, live.version), live.coalescer.waiting_rows))
    for live in repository.lives:
        read.append(("evalmode_queue_limit_rows", (live.name, live.version), live.coalescer.max_waiting_rows))
    return read


def process_reading() -> Reading:
    """Of any process."""
    measured = [(family.name, (), family.samples[0].value) for family in _process.collect()]
    return [*measured, ("evalmode_log_lines_lost", (), logs.lost())]
