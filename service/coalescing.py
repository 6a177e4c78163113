"""Coalescing: rows that wait at the same moment run as one batch; nobody waits for company.

`plan` decides, `Coalescer` acts.

Rule 1: there is no timer. What was submitted in one turn of the event loop runs together; while a batch runs in a
        thread, those that arrive form the next. A lone request never waits.
Rule 2: a request enters only as `Accepted`, so one caller's mistake cannot fail another's.
Rule 3: order is arrival; a request is never split and never overtaken.
Rule 4: every request submitted gets an answer or an exception; one that fails does not fail those beside it.
Rule 5: whoever has gone is dropped before anything is computed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from service.runtime import Runtime
from service.signature import Accepted

INLINE_RUN_S = 0.002
"""A model whose run takes less is run on the event loop: shorter than what two thread switches and their jitter cost
under load, and short enough that health checks do not notice."""

Outputs = list[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Request:
    accepted: Accepted
    answer: asyncio.Future[Outputs]


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

    def __init__(self, runtime: Runtime, *, max_rows: int, inline: bool) -> None:
        """
        Args:
            max_rows: 1 for a model whose answers other rows in the batch would change, be it by rounding.
            inline: run on the event loop (short models) instead of in a thread.
        """
        self._runtime = runtime
        self._max_rows = max_rows
        self._inline = inline
        self._waiting: deque[_Request] = deque()
        self._scheduled = False

    def submit(self, accepted: Accepted) -> asyncio.Future[Outputs]:
        """The outputs of these rows, one array per output of the model, as a future.

        Cancelling the future drops the rows if they have not started to run.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Outputs] = loop.create_future()
        self._waiting.append(_Request(accepted, answer))
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._run_next)
        return answer

    def _run_next(self) -> None:
        batch = self._take()
        if not batch:
            self._scheduled = False
        elif self._inline:
            self._finish(batch, self._compute(batch))
        else:
            run = asyncio.get_running_loop().run_in_executor(None, self._compute, batch)
            run.add_done_callback(lambda done: self._finish(batch, done.result()))

    def _take(self) -> list[_Request]:
        while self._waiting:
            count = plan((request.accepted.rows for request in self._waiting), self._max_rows)
            batch = [request for _ in range(count) if not (request := self._waiting.popleft()).answer.done()]
            if batch:
                return batch
        return []

    def _compute(self, batch: Sequence[_Request]) -> list[Outputs | Exception]:
        """One result for each request. Never raises: a batch that fails is run again request by request."""
        try:
            outputs = self._runtime.run(_stacked([request.accepted.tensors for request in batch]))
        except Exception as error:  # whatever it is, it belongs to the callers
            if len(batch) == 1:
                return [error]
            return [result for request in batch for result in self._compute([request])]
        ends = list(itertools.accumulate(request.accepted.rows for request in batch))
        return [[output[start:end] for output in outputs] for start, end in itertools.pairwise([0, *ends])]

    def _finish(self, batch: Sequence[_Request], results: Sequence[Outputs | Exception]) -> None:
        for request, result in zip(batch, results, strict=True):
            if request.answer.done():  # cancelled while it ran
                continue
            if isinstance(result, Exception):
                request.answer.set_exception(result)
            else:
                request.answer.set_result(result)
        asyncio.get_running_loop().call_soon(self._run_next)


def _stacked(requests: Sequence[Sequence[NDArray[Any]]]) -> Sequence[NDArray[Any]]:
    """The tensors of several requests as one batch: one array per input, rows in the order of the requests."""
    return requests[0] if len(requests) == 1 else [np.concatenate(arrays) for arrays in zip(*requests, strict=True)]
