"""Coalescing: rows that wait at the same moment run as one batch; nobody waits for company.

`plan` decides, `Coalescer` acts.

Rule 1: no batch waits for a timer. A request that is alone runs at once, and so does a full batch; what was submitted
        in one turn of the event loop runs together; while a batch runs in a thread, those that arrive form the next.
Rule 2: a request enters only as `Accepted`, so one caller's mistake cannot fail another's.
Rule 3: order is arrival, and nobody is overtaken by the way rows are put together. A request of more rows than run at
        a time runs in slices, and stands behind those who came meanwhile for each of them: it may take minutes, and
        they need not wait so long for it, nor it for long after nobody wants its answer any more.
Rule 4: every request submitted gets an answer or an exception; one that fails does not fail those beside it.
Rule 5: whoever has gone, or has no time left, is dropped before anything is computed; and a run that nobody waits for
        any more is ended.
Rule 6: the queue has an end. Who would wait too long, beyond its deadline, or behind too many rows or bytes is refused
        at once, and told when to come again. A few may always wait, however slow the model is.
Rule 7: how long a wait will be is told by batches that are at least half full, as they are when many wait: a row that
        runs alone may take as long as a full batch.
Rule 8: whoever has little time hears that it is over when it is; whoever has more, when somebody looks (`drop_late`).
        There is one timer for all of them, and only while one of them waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter_ns
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from service.errors import TIME, ClientLeft, DeadlineExceeded, QueueFull, RowsRejected
from service.runtime import Runtime
from service.signature import Accepted
from service.statistics import Statistics
from service.threads import own_thread

Outputs = list[NDArray[Any]]

ALWAYS_WAIT = 32
"""So many requests may wait however long it takes: a few dozen callers of a slow model, each with one request at a
time, are not too many."""

_RECENT = 0.1
"""The weight of the last batch in an average."""

LITTLE_TIME_NS = 10_000_000_000
"""Whoever has more hears of its end a second late, which it does not notice; among them are all who do not say."""

_log = logging.getLogger(__name__)


@final
class Computed:
    """A request's way through the model: its rows, then what the model gave for them, and where the time went."""

    __slots__ = (
        "accepted",
        "begin",
        "bytes",
        "compute_ns",
        "counted",
        "error",
        "expires_ns",
        "further",
        "gone",
        "outputs",
        "queue_ns",
        "since_ns",
        "tell",
    )

    def __init__(
        self,
        accepted: Accepted,
        tell: Tell,
        expires_ns: int | None,
        gone: Callable[[], bool] | None,
        counted: bool = True,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self.accepted = accepted
        self.begin = begin
        self.counted = counted
        """It is in the statistics."""
        self.bytes = 0
        """That it keeps in memory while it waits: of a slice, those of the whole request."""
        self.further = False
        """It is a slice, and not the first."""
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
        self,
        runtime: Runtime,
        *,
        max_rows: int,
        inline_rows: int,
        slice_rows: int = sys.maxsize,
        max_waiting_rows: int = sys.maxsize,
        max_waiting_bytes: int = sys.maxsize,
        max_wait_s: float = math.inf,
        row_s: float = 0.0,
        sample: Accepted | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """
        Args:
            max_rows: 1 for a model whose answers other rows in the batch would change, be it by rounding.
            inline_rows: a batch of so many rows is short enough to run on the event loop; a larger one gets a thread.
            slice_rows: a request of more rows runs in slices of so many.
            max_waiting_rows, max_waiting_bytes: of all requests that wait; one that finds nobody waiting may be larger.
            max_wait_s: who is expected to wait longer is refused, unless fewer than `ALWAYS_WAIT` requests wait.
            row_s: what a row takes in a large batch, as far as that is known before the first; 0: it is not.
            sample: rows that the model was admitted with. If it cannot compute those either, it is broken, and who
                asked is not to blame.
            statistics: what is run is counted there.
        """
        self._runtime = runtime
        self._max_rows = max_rows
        self._inline_rows = inline_rows
        self._slice_rows = slice_rows
        self._sample = sample
        self._full_runs_inline = 1 < max_rows <= inline_rows
        self._max_waiting_rows = max_waiting_rows
        self._max_waiting_bytes = max_waiting_bytes
        self._max_wait_s = max_wait_s
        self._statistics = Statistics() if statistics is None else statistics
        self._waiting: deque[Computed] = deque()
        self._waiting_rows = 0
        self._waiting_bytes = 0
        self._in_thread: Sequence[Computed] = ()
        """The batch that runs there."""
        self._unwanted_since_ns: int | None = None
        """Since when nobody waits for it, and it was told to end; None: somebody does."""
        self._thread: ThreadPoolExecutor | None = None
        """One, of this model alone, made when it is needed: one that is stuck holds up no other. It ends with the
        coalescer."""
        self._busy = False
        """A batch is running, or will in the next turn of the loop."""
        self._row_ns = row_s * 1e9
        """What a row takes when many wait, on average over the last batches; 0: nobody knows yet."""
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_ns: float = math.inf
        """When it goes off."""
        self.ran_ns = perf_counter_ns()
        """When the engine last gave an answer, on the clock of `perf_counter_ns`."""

    def submit(
        self,
        accepted: Accepted,
        tell: Tell,
        *,
        alone: bool = False,
        expires_ns: int | None = None,
        gone: Callable[[], bool] | None = None,
        counted: bool = True,
        begin: Callable[[], None] | None = None,
    ) -> None:
        """Run these rows, and tell what came of them: what the model gave, or what it raised, or `ClientLeft`, or
        `DeadlineExceeded`.

        Args:
            tell: may be called before this returns.
            alone: nobody else can be asking, so nothing is gained by waiting for the turn of the loop to end.
            expires_ns: on the clock of `perf_counter_ns`; after it nobody wants the answer.
            gone: says that the client has left.
            counted: False where nobody asked, so that no statistics know of it.
            begin: is called before it is computed. What it raises is told, and nothing is computed.

        Raises:
            QueueFull: it would wait too long, or take too much of the memory that waiting may take.
        """
        request = Computed(accepted, tell, expires_ns, gone, counted, begin)
        if alone and not self._busy and accepted.rows <= self._inline_rows:
            if _wanted(request, request.since_ns) and _begins(request):
                self._run_inline([request])
            return
        request.bytes = sum([tensor.nbytes for tensor in accepted.tensors])
        self.check_room(accepted.rows, request.bytes, math.inf if expires_ns is None else expires_ns - request.since_ns)
        self._enter(request if accepted.rows <= self._slice_rows else self._first_slice(request))
        if expires_ns is not None and expires_ns < self._alarm_ns and expires_ns - request.since_ns <= LITTLE_TIME_NS:
            self._set_alarm(expires_ns)
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().call_soon(self._run_next)
        elif self._full_runs_inline and self._waiting_rows >= self._max_rows and not self._in_thread:
            self._run_inline(self._take())

    @property
    def waiting_rows(self) -> int:
        return self._waiting_rows

    @property
    def max_waiting_rows(self) -> int:
        """As fast as the model runs now."""
        in_time = self._max_wait_s * 1e9 / self._row_ns if self._row_ns else math.inf
        return int(min(self._max_waiting_rows, max(ALWAYS_WAIT, in_time)))

    @property
    def busy(self) -> bool:
        """A batch is running, or will in the next turn of the loop."""
        return self._busy

    @property
    def unwanted_s(self) -> float:
        """How long a run has gone on since it was told to end, because nobody waits for it any more."""
        return 0.0 if self._unwanted_since_ns is None else (perf_counter_ns() - self._unwanted_since_ns) / 1e9

    def drop_late(self) -> None:
        """Tell those whose time is over, also if the engine is stuck and no batch will ever be taken again."""
        now_ns = perf_counter_ns()
        if any(_is_over(request, now_ns) for request in self._waiting):
            waiting, self._waiting = self._waiting, deque()
            for request in waiting:
                if _wanted(request, now_ns):
                    self._waiting.append(request)
                else:
                    self._leave(request)
        wanted = [_wanted(request, now_ns, runs=True) for request in self._in_thread]
        if wanted and not any(wanted):
            self._runtime.stop()
            if self._unwanted_since_ns is None:
                self._unwanted_since_ns = now_ns

    def _set_alarm(self, at_ns: float) -> None:
        self._stop_alarm()
        left_s = (at_ns - perf_counter_ns()) / 1e9
        self._alarm, self._alarm_ns = asyncio.get_running_loop().call_later(left_s, self._ring), at_ns

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm, self._alarm_ns = None, math.inf

    def _ring(self) -> None:
        """For the first whose time is over; and again for the next."""
        self._stop_alarm()
        self.drop_late()
        now_ns = perf_counter_ns()
        times_ns = [request.expires_ns for request in (*self._in_thread, *self._waiting)]
        if left_ns := [it for it in times_ns if it is not None and now_ns < it < now_ns + LITTLE_TIME_NS]:
            self._set_alarm(min(left_ns))

    def check_room(self, rows: int = 1, size: int = 0, time_ns: float = math.inf) -> None:
        """Whether a request may wait: whoever is refused before it was read cost little.

        Args:
            rows, size: of its tensors in bytes; by default the least that it may have.
            time_ns: that it has.

        Raises:
            QueueFull: it would wait too long, or take too much of the memory that waiting may take.
        """
        if self._waiting:
            wait_ns = self._waiting_rows * self._row_ns
            if bound := self._bound_hit(rows, size, time_ns, wait_ns):
                raise QueueFull(rows=self._waiting_rows, wait_s=wait_ns / 1e9, bound=bound)

    def _enter(self, request: Computed) -> None:
        self._waiting.append(request)
        self._waiting_rows += request.accepted.rows
        self._waiting_bytes += request.bytes

    def _bound_hit(self, rows: int, size: int, time_ns: float, wait_ns: float) -> str:
        """What keeps a request from joining those who wait, in words; empty: nothing does."""
        if self._waiting_rows + rows > self._max_waiting_rows:
            return f"at most {self._max_waiting_rows} rows may wait"
        if self._waiting_bytes + size > self._max_waiting_bytes:
            return f"at most {self._max_waiting_bytes} bytes may wait"
        if wait_ns > time_ns:
            return f"{TIME} would pass while it waits"
        if wait_ns > self._max_wait_s * 1e9 and len(self._waiting) >= ALWAYS_WAIT:
            return f"no request may wait longer than {self._max_wait_s:g} s"
        return ""

    def _first_slice(self, request: Computed) -> Computed:
        return _Slices(request, self._slice_rows, self._enter).next

    def _leave(self, request: Computed) -> None:
        self._waiting_rows -= request.accepted.rows
        self._waiting_bytes -= request.bytes

    def _run_next(self) -> None:
        batch = self._take()
        if not batch:
            self._rest()
        elif sum([request.accepted.rows for request in batch]) <= self._inline_rows:
            try:
                self._run_inline(batch)
            finally:
                self._go_on()
        else:
            self._run_in_thread(batch)

    def _run_inline(self, batch: Sequence[Computed]) -> None:
        self._compute(batch)
        _answer(batch)

    def _run_in_thread(self, batch: Sequence[Computed]) -> None:
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                self._compute(batch)
            finally:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(finish)  # by the way of a future it takes two turns of the loop

        def finish() -> None:
            self._in_thread, self._unwanted_since_ns = (), None
            _answer(batch)
            if self._waiting_rows >= self._max_rows:  # more cannot join, and a turn is long when many are refused
                self._run_next()
            else:
                self._go_on()

        if self._thread is None:
            self._thread = own_thread("model")
        try:
            self._thread.submit(run)
        except RuntimeError as error:  # the system gives no more threads
            self._thread = None  # it would run this batch with the next
            for request in batch:
                request.error = error
            _answer(batch)
            self._go_on()
        else:
            self._in_thread = batch

    def _go_on(self) -> None:
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run_next)
        else:
            self._rest()

    def _rest(self) -> None:
        """Nobody waits."""
        self._busy = False
        self._stop_alarm()

    def _take(self) -> list[Computed]:
        now_ns = perf_counter_ns()
        while self._waiting:
            count = plan((request.accepted.rows for request in self._waiting), self._max_rows)
            taken = [self._waiting.popleft() for _ in range(count)]
            for request in taken:
                self._leave(request)
            if batch := [request for request in taken if _wanted(request, now_ns) and _begins(request)]:
                return batch
        return []

    def _compute(self, batch: Sequence[Computed]) -> None:
        """Give each request its outputs or its error; a batch that fails is run request by request."""
        try:
            self._compute_together(batch)
        except Exception as error:  # whatever it is, it belongs to the callers
            if len(batch) == 1:
                batch[0].error = self._blamed(error)
                return
            for request in batch:
                if request.error is None:  # else it was told already, and perhaps this was stopped for it
                    self._compute([request])

    def _blamed(self, error: Exception) -> Exception:
        """The same, unless it blames the rows for what is wrong with the engine."""
        if isinstance(error, RowsRejected) and self._sample is not None:
            try:
                self._runtime.run(self._sample.tensors)
            except Exception as broken:
                return RuntimeError(f"the engine fails on a sample that the model was admitted with: {broken}")
        return error

    def _compute_together(self, batch: Sequence[Computed]) -> None:
        started_ns = perf_counter_ns()
        tensors = _stacked(batch)
        stacked_ns = perf_counter_ns()
        outputs = self._runtime.run(tensors)
        ran_ns = perf_counter_ns()
        rows = _split(outputs, batch)
        began_ns = max(self.ran_ns, batch[0].since_ns)  # what passes between two batches is waited for too
        self.ran_ns = ended_ns = perf_counter_ns()
        self._learn((ended_ns - began_ns) / rows, full=2 * rows >= self._max_rows)
        for request in batch:
            request.queue_ns = started_ns - request.since_ns
            request.compute_ns = ended_ns - started_ns
            if not request.counted:
                rows -= request.accepted.rows
        if rows:
            self._statistics.ran(
                rows,
                sum([request.counted and not request.further for request in batch]),
                input_ns=stacked_ns - started_ns,
                infer_ns=ran_ns - stacked_ns,
                output_ns=ended_ns - ran_ns,
            )

    def _learn(self, row_ns: float, *, full: bool) -> None:
        """What a row took. A batch that is not full tells only that it takes no longer than that."""
        if full or row_ns < self._row_ns:
            self._row_ns += (row_ns - self._row_ns) * (_RECENT if self._row_ns else 1.0)


@final
class _Slices:
    """A request that runs in several slices, one after the other; what they gave is put together as it comes."""

    def __init__(self, whole: Computed, rows: int, enter: Callable[[Computed], None]) -> None:
        """
        Args:
            rows: of each slice but the last.
            enter: where each of them waits.
        """
        self._whole = whole
        self._rows = rows
        self._enter = enter
        self._done_rows = 0

    @property
    def next(self) -> Computed:
        whole, start = self._whole, self._done_rows
        end = min(start + self._rows, whole.accepted.rows)
        rows = Accepted(tuple([tensor[start:end] for tensor in whole.accepted.tensors]), end - start)
        begin, whole.begin = whole.begin, None
        request = Computed(rows, self._tell, whole.expires_ns, whole.gone, whole.counted, begin)
        request.bytes = whole.bytes
        request.further = start > 0
        return request

    def _tell(self, request: Computed) -> None:
        whole, start = self._whole, self._done_rows
        try:
            if request.error is not None:
                raise request.error
            self._done_rows += request.accepted.rows
            whole.queue_ns += request.queue_ns
            whole.compute_ns += request.compute_ns
            if not whole.outputs:
                whole.outputs = [np.empty((whole.accepted.rows, *it.shape[1:]), it.dtype) for it in request.outputs]
            for output, part in zip(whole.outputs, request.outputs, strict=True):
                if part.shape[1:] != output.shape[1:]:
                    raise RowsRejected(f"it gave rows of shape {list(output.shape[1:])} and {list(part.shape[1:])}")
                output[start : self._done_rows] = part
        except Exception as error:
            whole.error = error
        if whole.error is not None or self._done_rows == whole.accepted.rows:
            _answer([whole])
        else:
            self._enter(self.next)


def _answer(batch: Sequence[Computed]) -> None:
    for request in batch:
        tell, request.tell = request.tell, _nobody  # who was told that its time is over hears no more
        try:
            tell(request)
        except Exception:  # the others are told all the same
            _log.exception("an answer could not be given")


def _nobody(_: Computed) -> None:
    pass


def _is_over(request: Computed, now_ns: int) -> bool:
    """Nobody waits for the answer, or has time to."""
    return (request.gone is not None and request.gone()) or (
        request.expires_ns is not None and now_ns >= request.expires_ns
    )


def _wanted(request: Computed, now_ns: int, *, runs: bool = False) -> bool:
    """Somebody waits for the answer, and still has time to; who does not is told why.

    Args:
        runs: it is being computed.
    """
    if request.gone is not None and request.gone():
        request.error = ClientLeft()
    elif request.expires_ns is not None and now_ns >= request.expires_ns:
        request.error = DeadlineExceeded(began=runs or request.further)
    else:
        return True
    _answer([request])
    return False


def _begins(request: Computed) -> bool:
    """Nothing keeps it from being computed; who is kept is told why."""
    if request.begin is not None:
        try:
            request.begin()
        except Exception as error:
            request.error = error
            _answer([request])
            return False
    return True


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
