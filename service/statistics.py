"""What a version of a model has done since it was loaded: counts and durations.

The fields are those of the statistics extension of the Open Inference Protocol (triton-inference-server,
`docs/protocol/extension_statistics.md`): a duration is a count and the nanoseconds of all of them together, and each
request of a batch counts the whole batch's computing as its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

Document = dict[str, Any]


@dataclass(slots=True)
class Duration:
    """How often something was done, and how long it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns

    def document(self) -> Document:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class _BatchSize:
    input: Duration
    infer: Duration
    output: Duration


@final
class Statistics:
    """Counters of one version; each of them is changed by one thread at a time."""

    def __init__(self) -> None:
        self.success = Duration()
        """From a request's last byte read to its answer rendered."""
        self.fail = Duration()
        """Requests that reached the model and got another status than 200."""
        self.queue = Duration()
        self._compute = _BatchSize(Duration(), Duration(), Duration())
        self._batches: dict[int, _BatchSize] = {}
        self._rows = 0
        self._runs = 0
        self._last_run_ms = 0

    def ran(self, *, rows: int, requests: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """A batch was stacked, run and split."""
        self._rows += rows
        self._runs += 1
        self._last_run_ms = time.time_ns() // 1_000_000
        batch = self._batches.get(rows)
        if batch is None:
            batch = self._batches[rows] = _BatchSize(Duration(), Duration(), Duration())
        batch.input.add(input_ns)
        batch.infer.add(infer_ns)
        batch.output.add(output_ns)
        self._compute.input.add(input_ns * requests, requests)
        self._compute.infer.add(infer_ns * requests, requests)
        self._compute.output.add(output_ns * requests, requests)

    def document(self, *, name: str, version: str) -> Document:
        """One entry of `model_stats`."""
        nothing = Duration()
        return {
            "name": name,
            "version": version,
            "last_inference": self._last_run_ms,
            "inference_count": self._rows,
            "execution_count": self._runs,
            "inference_stats": {
                "success": self.success.document(),
                "fail": self.fail.document(),
                "queue": self.queue.document(),
                "compute_input": self._compute.input.document(),
                "compute_infer": self._compute.infer.document(),
                "compute_output": self._compute.output.document(),
                "cache_hit": nothing.document(),
                "cache_miss": nothing.document(),
            },
            "response_stats": {},
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": batch.input.document(),
                    "compute_infer": batch.infer.document(),
                    "compute_output": batch.output.document(),
                }
                for rows, batch in sorted(self._batches.items())
            ],
            "memory_usage": [],
        }


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
