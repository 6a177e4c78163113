"""What this process has counted since its start, for whoever watches the service.

Rule 1: no count begins anew. The statistics of the protocol begin at zero when a model is loaded anew; these go on. A
        version that was replaced long ago is told of no more, so that what is read does not grow with each new one: a
        series may end, but neither jump nor fall.
Rule 2: on the way of a prediction there are additions, and for each duration one search in a short list of bounds.
Rule 3: no label is a word of a caller: a model is named if it was admitted, a route by its pattern.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import final

from service.policy import Judged
from service.readings import DURATION_BOUNDS_NS, ROW_BOUNDS, Reading, Sample

MOST_REPLACED = 50
"""Versions of a model that are live no more and still told of."""


@final
class Histogram:
    """How many values lie below each bound and above the one before, how many above all, and their sum.

    Whoever adds on the way of a prediction writes the two lines of `add` there: a call costs as much as they do.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def value(self) -> list[int]:
        return [*self.counts, self.sum]


@final
class ModelCounts:
    """Of one version of a model, over all the times that it was loaded."""

    __slots__ = ("answered", "batch_rows", "compute_ns", "duration_ns", "queue_ns")

    def __init__(self) -> None:
        self.answered: dict[str, int] = {}
        """Predictions by route."""
        self.duration_ns = Histogram(DURATION_BOUNDS_NS)
        self.queue_ns = Histogram(DURATION_BOUNDS_NS)
        self.compute_ns = Histogram(DURATION_BOUNDS_NS)
        self.batch_rows = Histogram(ROW_BOUNDS)


@final
class Loads:
    """How often a model was looked at, and what came of it."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def begin(self, found: Iterable[Judged]) -> None:
        """What was found at the start, versions of a model side by side, newest first."""
        for model, versions in groupby(found, lambda version: version.name):
            self.add(model, ready=next(versions).ready)

    def add(self, model: str, *, ready: bool) -> None:
        self._counts[model, "admitted" if ready else "refused"] += 1

    def reading(self) -> Reading:
        return [("evalmode_loads", labels, count) for labels, count in self._counts.items()]


@final
class Counts:
    """Of one process. Belongs to one event loop."""

    def __init__(self) -> None:
        self.begun = 0
        """Predictions that were read."""
        self.refused = 0
        """Predictions that got another status than 200."""
        self._models: dict[tuple[str, str], ModelCounts] = {}
        """By model and version; those that were live last come last."""
        self._answered_before = 0
        """Predictions of versions that are told of no more."""
        self._others: Counter[tuple[str, str, str, int]] = Counter()
        self._refusals: Counter[tuple[str, str, str, int]] = Counter()

    def of(self, model: str, version: str) -> ModelCounts:
        """Those of an admitted version: the same ones each time."""
        return self._models.setdefault((model, version), ModelCounts())

    def pass_over(self, model: str, live: Collection[str]) -> None:
        """Tell no more of its versions that are live no more, but for the last of them.

        Args:
            live: those that are, or that still answer somebody.
        """
        for version in live:
            self._models[model, version] = self._models.pop((model, version))
        replaced = [version for name, version in self._models if name == model and version not in live]
        for version in replaced[:-MOST_REPLACED]:
            self._answered_before += sum(self._models.pop((model, version)).answered.values())
            for counted in (self._others, self._refusals):
                for labels in [labels for labels in counted if labels[:2] == (model, version)]:
                    del counted[labels]

    def ended(self, route: str, status: int, *, reason: str, model: str = "", version: str = "") -> None:
        """A request that is no answered prediction got this status.

        Args:
            reason: the code of the error; empty if there was none.
        """
        self._others[model, version, route, status] += 1
        if reason:
            self._refusals[model, version, reason, status] += 1

    @property
    def answered(self) -> int:
        """Predictions that got their answer."""
        told_of = sum(count for counts in self._models.values() for count in counts.answered.values())
        return self._answered_before + told_of

    def reading(self) -> Reading:
        read: list[Sample] = [("evalmode_requests_in_flight", (), self.begun - self.refused - self.answered)]
        for (model, version, route, status), count in self._others.items():
            read.append(("evalmode_requests", (model, version, route, str(status)), count))
        for (model, version, reason, status), count in self._refusals.items():
            read.append(("evalmode_refusals", (model, version, reason, str(status)), count))
        for labels, counts in self._models.items():
            for route, count in counts.answered.items():
                read.append(("evalmode_requests", (*labels, route, "200"), count))
            read.append(("evalmode_request_duration_seconds", labels, counts.duration_ns.value))
            read.append(("evalmode_queue_duration_seconds", labels, counts.queue_ns.value))
            read.append(("evalmode_compute_duration_seconds", labels, counts.compute_ns.value))
            read.append(("evalmode_batch_rows", labels, counts.batch_rows.value))
        return read
