"""What a version of a model has done since it was loaded: counts and durations.

The fields are those of the statistics extension of the Open Inference Protocol (triton-inference-server,
`docs/protocol/extension_statistics.md`): a duration is a count and the nanoseconds of all of them together, and each
request of a batch counts the whole batch's computing as its own.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from service.counts import ModelCounts
from service.readings import DURATION_BOUNDS_NS, ROW_BOUNDS

Document = dict[str, Any]


@dataclass(slots=True)
class _Batches:
    """The batches of one size, and the time that all of them took together."""

    executions: int = 0
    requests: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


@final
class Statistics:
    """Counters of one version; each of them is changed by one thread at a time."""

    def __init__(self) -> None:
        self.counts = ModelCounts()
        """What goes on when the version is loaded anew; `Repository.swap` puts those of the times before here."""
        self._answered = 0
        self._answered_ns = 0
        self._failed = 0
        self._failed_ns = 0
        self._queue_ns = 0
        self._batches: dict[int, _Batches] = {}
        self._requests_ns = _Batches()
        """The time of each batch, once for each of its requests."""
        self._last_run_ms = 0

    def answered(self, whole_ns: int, queue_ns: int, route: str) -> None:
        """A request got its answer, so long after its last byte was read; so much of that it waited for its batch."""
        self._answered += 1
        self._answered_ns += whole_ns
        self._queue_ns += queue_ns
        counts = self.counts
        counts.answered[route] = counts.answered.get(route, 0) + 1
        duration, queue = counts.duration_ns, counts.queue_ns
        duration.counts[bisect_left(DURATION_BOUNDS_NS, whole_ns)] += 1
        duration.sum += whole_ns
        queue.counts[bisect_left(DURATION_BOUNDS_NS, queue_ns)] += 1
        queue.sum += queue_ns

    def failed(self, whole_ns: int) -> None:
        """A request reached the model and got another status than 200."""
        self._failed += 1
        self._failed_ns += whole_ns

    def ran(self, rows: int, requests: int, *, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """A batch was stacked, run and split.

        Args:
            requests: that began in it; none for a further slice of one.
        """
        self._last_run_ms = time.time_ns() // 1_000_000
        batches = self._batches.get(rows)
        if batches is None:
            batches = self._batches[rows] = _Batches()
        batches.executions += 1
        batches.requests += requests
        batches.input_ns += input_ns
        batches.infer_ns += infer_ns
        batches.output_ns += output_ns
        each = self._requests_ns
        each.requests += requests
        times = requests or 1
        each.input_ns += input_ns * times
        each.infer_ns += infer_ns * times
        each.output_ns += output_ns * times
        batch_rows, compute, compute_ns = (
            self.counts.batch_rows,
            self.counts.compute_ns,
            input_ns + infer_ns + output_ns,
        )
        batch_rows.counts[bisect_left(ROW_BOUNDS, rows)] += 1
        batch_rows.sum += rows
        compute.counts[bisect_left(DURATION_BOUNDS_NS, compute_ns)] += 1
        compute.sum += compute_ns

    def document(self, *, name: str, version: str) -> Document:
        """One entry of `model_stats`."""
        each = self._requests_ns
        sizes = sorted(self._batches.items(), key=lambda item: item[0])  # at once: a thread may add another
        return {
            "name": name,
            "version": version,
            "last_inference": self._last_run_ms,
            "inference_count": sum(rows * batches.executions for rows, batches in sizes),
            "execution_count": sum(batches.executions for _, batches in sizes),
            "inference_stats": {
                "success": _duration(self._answered, self._answered_ns),
                "fail": _duration(self._failed, self._failed_ns),
                "queue": _duration(self._answered, self._queue_ns),
                "compute_input": _duration(each.requests, each.input_ns),
                "compute_infer": _duration(each.requests, each.infer_ns),
                "compute_output": _duration(each.requests, each.output_ns),
                "cache_hit": _duration(0, 0),
                "cache_miss": _duration(0, 0),
            },
            "response_stats": {},
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": _duration(batches.executions, batches.input_ns),
                    "compute_infer": _duration(batches.executions, batches.infer_ns),
                    "compute_output": _duration(batches.executions, batches.output_ns),
                }
                for rows, batches in sizes
            ],
            "memory_usage": [],
        }


def _duration(count: int, ns: int) -> Document:
    return {"count": count, "ns": ns}


def summed(documents: Iterable[Document]) -> list[Document]:
    """The entries of several processes, one for each version, in order of name and version.

    Args:
        documents: as `Statistics.document` gives them; not changed.
    """
    versions: dict[tuple[str, str], Document] = {}
    for document in documents:
        key = (document["name"], document["version"])
        versions[key] = _sum(versions[key], document) if key in versions else document
    return [versions[key] for key in sorted(versions)]


def _sum(one: Document, other: Document) -> Document:
    total = {field: _field_sum(field, one[field], other[field]) for field in one}
    sizes: dict[int, Document] = {}
    for batch in (*one["batch_stats"], *other["batch_stats"]):
        size = batch["batch_size"]
        sizes[size] = {**_nested_sum(sizes[size], batch), "batch_size": size} if size in sizes else batch
    return {**total, "batch_stats": [sizes[size] for size in sorted(sizes)]}


def _field_sum(field: str, one: Any, other: Any) -> Any:
    if field == "last_inference":
        return max(one, other)
    return _nested_sum(one, other)


def _nested_sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: _nested_sum(one[key], other[key]) for key in one}
    return one + other if isinstance(one, int) else one
