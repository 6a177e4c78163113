"""What is counted and measured, by name, and what several processes make of it together.

A reading is a list of samples, each a name of the table `FAMILIES`, its labels and its value; it crosses between
processes as JSON. A histogram's value is a list: how many below each bound and above the one before, how many above
all, and the sum of what was added.

Rule 1: a count of a process that is gone stays in the total; what it measured (a gauge) goes with it.
Rule 2: nothing here knows a model, an engine or the text that Prometheus reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

Sample = tuple[str, Sequence[str], Any]
Reading = list[Sample]

_BOUNDS_MS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000)
DURATION_BOUNDS_NS = tuple(round(bound_ms * 1_000_000) for bound_ms in _BOUNDS_MS)
"""From half of what a small network takes, over HTTP, to the deadline of who does not say one."""

ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """All samples of one name."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    join: Callable[[Any, Any], Any] = operator.add
    """Of two processes' values, where they are numbers."""
    bounds: tuple[int, ...] = ()
    scale: float = 1
    """What a bound and the sum are multiplied with to be in the unit of the name."""


_MODEL = ("model", "version")
_NS = 1e-9

FAMILIES: dict[str, Family] = {
    "evalmode_ready": Family(
        kind="gauge",
        join=min,
        help="Whether there is a model, and none failed when readiness was last asked, or each answered since.",
    ),
    "evalmode_requests": Family(
        kind="counter",
        labels=(*_MODEL, "route", "code"),
        help="Requests that were answered, by HTTP status. No model: it never reached one.",
    ),
    "evalmode_refusals": Family(
        kind="counter",
        labels=(*_MODEL, "reason", "code"),
        help="Requests that were refused or failed, by the code in their answer and its HTTP status.",
    ),
    "evalmode_request_duration_seconds": Family(
        kind="histogram",
        labels=_MODEL,
        bounds=DURATION_BOUNDS_NS,
        scale=_NS,
        help="Predictions answered with 200: from the last byte of the request to the answer.",
    ),
    "evalmode_queue_duration_seconds": Family(
        kind="histogram",
        labels=_MODEL,
        bounds=DURATION_BOUNDS_NS,
        scale=_NS,
        help="Predictions answered with 200: how long each waited for its batch to run.",
    ),
    "evalmode_compute_duration_seconds": Family(
        kind="histogram",
        labels=_MODEL,
        bounds=DURATION_BOUNDS_NS,
        scale=_NS,
        help="Batches: how long the model ran, stacking and splitting the rows included.",
    ),
    "evalmode_batch_rows": Family(
        kind="histogram", labels=_MODEL, bounds=ROW_BOUNDS, help="Batches: rows that ran together."
    ),
    "evalmode_requests_in_flight": Family(kind="gauge", help="Predictions that were read and are not answered yet."),
    "evalmode_queue_rows": Family(kind="gauge", labels=_MODEL, help="Rows that wait for their batch."),
    "evalmode_queue_limit_rows": Family(
        kind="gauge", labels=_MODEL, help="The most rows that may wait, as fast as it runs now."
    ),
    "evalmode_loads": Family(
        kind="counter",
        labels=("model", "result"),
        help="How often a model was looked at, at the start, by request or since it changed, and what came of it.",
    ),
    "evalmode_unreadable_folders": Family(
        kind="gauge", help="Folders of models that cannot be looked at now; what was served of them goes on."
    ),
    "evalmode_worker_restarts": Family(kind="counter", help="Workers that ended and were replaced."),
    "evalmode_workers": Family(kind="gauge", help="Processes that serve."),
    "evalmode_log_lines_lost": Family(
        kind="counter", help="Lines of the log that could not be written: it is closed, full, or too slow."
    ),
    "process_cpu_seconds": Family(kind="counter", help="CPU time of all processes of the service."),
    "process_resident_memory_bytes": Family(
        kind="gauge", help="Resident memory of all processes of the service; what they share counts for each."
    ),
    "process_virtual_memory_bytes": Family(kind="gauge", help="Virtual memory of all processes of the service."),
    "process_open_fds": Family(kind="gauge", help="Open file descriptors of all processes of the service."),
    "process_max_fds": Family(kind="gauge", join=min, help="The most file descriptors that one of them may open."),
    "process_start_time_seconds": Family(
        kind="gauge", join=min, help="When the service was started, since the epoch, in seconds."
    ),
}


def joined(readings: Iterable[Reading]) -> Reading:
    """What several processes read, as if it were one; not changed."""
    total: dict[tuple[str, tuple[str, ...]], Any] = {}
    for reading in readings:
        for name, labels, value in reading:
            key = (name, tuple(labels))
            total[key] = _join(name, total[key], value) if key in total else value
    return [(name, labels, value) for (name, labels), value in total.items()]


def _join(name: str, one: Any, other: Any) -> Any:
    if isinstance(one, list):
        return [left + right for left, right in zip(one, other, strict=True)]
    return FAMILIES[name].join(one, other)


def lasting(reading: Reading) -> Reading:
    """What of it stays when its process is gone."""
    return [sample for sample in reading if FAMILIES[sample[0]].kind != "gauge"]
