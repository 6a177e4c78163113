"""Before a model is ready, it is run once at every batch size that it will be used at.

An engine prepares for a shape when it first sees it, and the first caller of each would pay for it. The same runs tell
how many rows are worth running together, how many are short enough for the event loop, and whether company changes an
answer by rounding, at any size and not only at those that admission tried.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.admission import LONGEST_RUN_S, Admitted
from service.bundle import IndependenceFigure
from service.numerics import largest_difference, same_bits
from service.runtime import Runtime
from service.settings import Numerics

INLINE_RUN_S = 0.002
"""A batch that takes less runs on the event loop: shorter than what two thread switches and their jitter cost under
load, and short enough that health checks do not notice."""


SLICE_S = 0.02
"""Others get their turn after so long; much less would cost more in turns than in computing."""

MOST_SLICE_ROWS = 2**16

LONGEST_REHEARSAL_S = 5.0
"""Sizes that were not tried in this time are not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How a model's rows may run together, as measured where it will run."""

    max_rows: int
    """The most rows that run together; 1 where more would change a bit and `exact` is wanted, or where rows differ in
    shape."""
    slice_rows: int
    """The most rows of one request that run at a time: as many as independence was shown for; or where it is exact, as
    run in `SLICE_S`."""
    inline_rows: int
    """The most rows that run on the event loop; larger batches get a thread. 0: none."""
    run_s: dict[int, float]
    """Seconds of a run, by rows: at 1, 2, 4, ... and the maximum."""
    independence: IndependenceFigure
    """Admission's, with what the other sizes showed."""

    @property
    def row_s(self) -> float:
        """Seconds of a row in the largest batch."""
        rows, run_s = max(self.run_s.items())
        return run_s / rows


def rehearse(admitted: Admitted, numerics: Numerics) -> Batching:
    """Run the model at every size it will be used at.

    Args:
        numerics: `exact` lets rows share a batch only where no bit of an answer depends on it; `bounded` also where the
            difference is within what rounding explains.
    """
    runtime, rows, figure = admitted.runtime, admitted.subjects, admitted.independence
    fixed = runtime.inputs[0].shape[0]
    # where a caller decides how long a row is, it decides how long a run takes: never on the event loop
    open_ended = any(-1 in spec.shape[1:] for spec in runtime.inputs)
    if fixed != -1:
        only_s = _run_s(runtime, rows, fixed)
        inline_rows = fixed if only_s < INLINE_RUN_S and not open_ended else 0
        return Batching(
            max_rows=1, slice_rows=fixed, inline_rows=inline_rows, run_s={fixed: only_s}, independence=figure
        )
    most = admitted.max_batch_rows
    if open_ended:
        return Batching(
            max_rows=1, slice_rows=most, inline_rows=0, run_s={1: _run_s(runtime, rows, 1)}, independence=figure
        )
    shared = numerics == "bounded" or figure.kind == "exact"
    run_s = _times(runtime, rows, admitted.max_batch_rows if shared else 1)
    figure = _every_size(admitted, max(run_s))
    together = figure.batch_sizes[-1]
    slice_rows = together if shared else most
    if numerics == "exact" and figure.kind == "bounded":
        together = 1
    run_s = {size: seconds for size, seconds in run_s.items() if size <= together}
    if figure.kind == "exact":
        slice_rows = _slice_rows(together, run_s)
    inline_rows = max((size for size, seconds in run_s.items() if seconds < INLINE_RUN_S), default=0)
    return Batching(max_rows=together, slice_rows=slice_rows, inline_rows=inline_rows, run_s=run_s, independence=figure)


def _slice_rows(together: int, run_s: dict[int, float]) -> int:
    """A power of two times what runs together."""
    rows, most = max(run_s.items())
    slice_rows = together
    while 2 * slice_rows * most / rows < SLICE_S and 2 * slice_rows <= MOST_SLICE_ROWS:
        slice_rows *= 2
    return slice_rows


def _times(runtime: Runtime, rows: Sequence[NDArray[Any]], max_rows: int) -> dict[int, float]:
    """Seconds of a run at 1, 2, 4, ... and `max_rows`, as far as a batch stays within `LONGEST_RUN_S`."""
    times: dict[int, float] = {}
    size = 1
    while True:
        seconds = _run_s(runtime, rows, size)
        if size > 1 and seconds > LONGEST_RUN_S:
            return times
        times[size] = seconds
        following = min(2 * size, max_rows)
        if following == size or seconds * following / size > LONGEST_RUN_S:
            return times
        size = following


def _every_size(admitted: Admitted, max_rows: int) -> IndependenceFigure:
    """Hold the rows of every batch size against the same rows alone, as long as rounding explains what differs, and as
    long as there is time."""
    runtime, rows = admitted.runtime, admitted.subjects
    count = rows[0].shape[0]
    each = [runtime.run([array[i : i + 1] for array in rows]) for i in range(count)]
    alone = [np.concatenate(parts) for parts in zip(*each, strict=True)]
    exact, bound, size = admitted.independence.kind == "exact", admitted.independence.bound, 1
    until_s = time.perf_counter() + LONGEST_REHEARSAL_S
    while size < max_rows and time.perf_counter() < until_s:
        places = np.arange(size + 1) % count
        together = runtime.run([array[places] for array in rows])
        differences = [largest_difference(one[places], other) for one, other in zip(alone, together, strict=True)]
        if not all(difference <= most for difference, most in zip(differences, admitted.bounds, strict=True)):
            break
        exact = exact and all(same_bits(one[places], other) for one, other in zip(alone, together, strict=True))
        bound = max(bound, *differences)
        size += 1
    return IndependenceFigure(kind="exact" if exact else "bounded", bound=bound, batch_sizes=tuple(range(1, size + 1)))


def _run_s(runtime: Runtime, rows: Sequence[NDArray[Any]], size: int) -> float:
    """The median of three runs, after one that warms up."""
    places = np.arange(size) % rows[0].shape[0]
    batch = [array[places] for array in rows]
    runtime.run(batch)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        runtime.run(batch)
        times.append(time.perf_counter() - start)
    return float(np.median(times))
