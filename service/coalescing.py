"""Coalescing: rows that wait at the same moment run as one batch; nobody waits for company.

`plan` decides, `Coalescer` acts.

Rule 1: there is no timer. A request that is alone runs at once; what was submitted in one turn of the event loop runs
        together; while a batch runs in a thread, those that arrive form the next.
Rule 2: a request enters only as `Accepted`, so one caller's mistake cannot fail another's.
Rule 3: order is arrival; a request is never split and never overtaken.
Rule 4: every request submitted gets an answer or an exception; one that fails does not fail those beside it.
Rule 5: whoever has gone, or has no time left, is dropped before anything is computed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter_ns
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from service.errors import ClientLeft, DeadlineExceeded, RowsRejected
from service.runtime import Runtime
from service.signature import Accepted
from service.statistics import Statistics

Outputs = list[NDArray[Any]]

_log = logging.getLogger(__name__)


@final
class Computed:
    """A request's way through the model: its rows, then what the model gave for them, and where the time went."""

    __slots__ = ("accepted", "compute_ns", "error", "expires_ns", "gone", "outputs", "queue_ns", "since_ns", "tell")

    def __init__(self, accepted: Accepted, tell: Tell, expires_ns: int | None, gone: Callable[[], bool] | None) -> None:
        self.accepted = accepted
        self.tell = tell
        self.expires_ns = expires_ns
        self.gone = gone
        self.since_ns = perf_counter_ns()
        """When it was submitted."""
        self.outputs: Outputs = []
        """One array per output of the model, with this request's rows."""
        self.error: Exception | None = None
        """Why there are none."""
        self.queue_ns = 0
        self.compute_ns = 0
        """Of the whole batch that it ran in."""


Tell = Callable[[Computed], None]
"""Called once, on the event loop, with the outputs or the error."""


def plan(waiting_rows: Iterable[int], max_rows: int) -> int:
    """How many of the waiting requests, first come first, run together now.

    Args:
        waiting_rows: rows of each waiting request in order of arrival, each at least 1; read only as far as needed.
        max_rows: the most rows that run together; a request that is larger by itself runs alone.

    >>> plan([1, 1, 1], 64), plan([30, 30, 30], 64), plan([100, 1], 64), plan([], 64)
    (3, 2, 1, 0)
    """
    total = count = 0
    for rows in waiting_rows:
        total += rows
        if count and total > max_rows:
            break
        count += 1
    return count


@final
class Coalescer:
    """Runs the requests for one model, in batches as they come. Belongs to one event loop."""

    def __init__(
        self, runtime: Runtime, *, max_rows: int, inline_rows: int, statistics: Statistics | None = None
    ) -> None:
        """
        Args:
            max_rows: 1 for a model whose answers other rows in the batch would change, be it by rounding.
            inline_rows: a batch of so many rows is short enough to run on the event loop; a larger one gets a thread.
            statistics: what is run is counted there.
        """
        self._runtime = runtime
        self._max_rows = max_rows
        self._inline_rows = inline_rows
        self._statistics = Statistics() if statistics is None else statistics
        self._waiting: deque[Computed] = deque()
        self._busy = False
        """A batch is running, or will in the next turn of the loop."""

    def submit(
        self,
        accepted: Accepted,
        tell: Tell,
        *,
        alone: bool = False,
        expires_ns: int | None = None,
        gone: Callable[[], bool] | None = None,
    ) -> None:
        """Run these rows, and tell what came of them: what the model gave, or what it raised, or `ClientLeft`, or
        `DeadlineExceeded`.

        Args:
            tell: may be called before this returns.
            alone: nobody else can be asking, so nothing is gained by waiting for the turn of the loop to end.
            expires_ns: on the clock of `perf_counter_ns`; after it nobody wants the answer.
            gone: says that the client has left.
        """
        request = Computed(accepted, tell, expires_ns, gone)
        if alone and not self._busy and accepted.rows <= self._inline_rows:
            if expires_ns is None or _wanted(request, request.since_ns):
                batch = [request]
                self._compute(batch)
                _answer(batch)
            return
        self._waiting.append(request)
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().call_soon(self._run_next)

    def _run_next(self) -> None:
        batch = self._take()
        if not batch:
            self._busy = False
        elif sum([request.accepted.rows for request in batch]) <= self._inline_rows:
            self._compute(batch)
            self._finish(batch)
        else:
            try:
                run = asyncio.get_running_loop().run_in_executor(None, self._compute, batch)
            except RuntimeError as error:  # the system gives no more threads
                for request in batch:
                    request.error = error
                self._finish(batch)
            else:
                run.add_done_callback(lambda _: self._finish(batch))

    def _finish(self, batch: Sequence[Computed]) -> None:
        _answer(batch)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run_next)
        else:
            self._busy = False

    def _take(self) -> list[Computed]:
        now_ns = perf_counter_ns()
        while self._waiting:
            count = plan((request.accepted.rows for request in self._waiting), self._max_rows)
            taken = [self._waiting.popleft() for _ in range(count)]
            if batch := [request for request in taken if _wanted(request, now_ns)]:
                return batch
        return []

    def _compute(self, batch: Sequence[Computed]) -> None:
        """Give each request its outputs or its error. Never raises: a batch that fails is run request by request."""
        started_ns = perf_counter_ns()
        try:
            tensors = _stacked(batch)
            stacked_ns = perf_counter_ns()
            outputs = self._runtime.run(tensors)
            ran_ns = perf_counter_ns()
            rows = _split(outputs, batch)
        except Exception as error:  # whatever it is, it belongs to the callers
            if len(batch) == 1:
                batch[0].error = error
            else:
                for request in batch:
                    self._compute([request])
            return
        ended_ns = perf_counter_ns()
        for request in batch:
            request.queue_ns = started_ns - request.since_ns
            request.compute_ns = ended_ns - started_ns
        self._statistics.ran(
            rows,
            len(batch),
            input_ns=stacked_ns - started_ns,
            infer_ns=ran_ns - stacked_ns,
            output_ns=ended_ns - ran_ns,
        )


def _answer(batch: Sequence[Computed]) -> None:
    for request in batch:
        try:
            request.tell(request)
        except Exception:  # whoever is told last hears it too
            _log.exception("an answer could not be given")


def _wanted(request: Computed, now_ns: int) -> bool:
    """Somebody waits for the answer, and still has time to; who does not is told why."""
    if request.gone is not None and request.gone():
        request.error = ClientLeft()
    elif request.expires_ns is not None and now_ns >= request.expires_ns:
        request.error = DeadlineExceeded()
    else:
        return True
    _answer([request])
    return False


def _stacked(batch: Sequence[Computed]) -> Sequence[NDArray[Any]]:
    """The tensors of several requests as one batch: one array per input, rows in the order of the requests."""
    if len(batch) == 1:
        return batch[0].accepted.tensors
    return [np.concatenate(arrays) for arrays in zip(*[request.accepted.tensors for request in batch], strict=True)]


def _split(outputs: Outputs, batch: Sequence[Computed]) -> int:
    """Give each request its own rows of every output; returns how many rows they are together.

    Raises:
        RowsRejected: an output has more or fewer rows, so that nobody can say whose they are.
    """
    rows = sum([request.accepted.rows for request in batch])
    for output in outputs:
        if output.shape[:1] != (rows,):
            raise RowsRejected(f"it gave an output of shape {list(output.shape)} for {rows} rows")
    if len(batch) == 1:
        batch[0].outputs = outputs
        return rows
    start = 0
    for request in batch:
        end = start + request.accepted.rows
        request.outputs = [output[start:end] for output in outputs]
        start = end
    return rows
