"""Many callers over kept-alive connections: as soon as they are answered, or when their time has come.

Rule 1: in an open loop latency counts from the planned time, so that a client that is late makes nothing look faster;
        how late it was is noted.
Rule 2: a request goes over a connection that is free, and over a new one if none is; it waits for no other request.
Rule 3: each answer of 200 is compared with the one that is expected, byte by byte.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import final

import numpy as np

LAST_ANSWER_S = 60.0
"""After the last request so long is waited for answers; the server gives up after 30 s."""

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_QUEUE = re.compile(rb"\r\nserver-timing: queue;dur=([\d.]+)", re.IGNORECASE)
_RETRY_AFTER = re.compile(rb"\r\nretry-after: (\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Question:
    """A request, and the body of its answer."""

    request: bytes
    answer: bytes


@dataclass(slots=True)
class Answers:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    """`closed` and `silent` among them."""
    latency_s: list[float] = field(default_factory=list)
    """Of those answered 200."""
    queue_s: list[float] = field(default_factory=list)
    """Of the same, as the server says."""
    retry_after_s: list[int] = field(default_factory=list)
    """Of those answered 429; 0 for one without."""
    wrong: int = 0
    """Answered 200, and not as expected."""
    late_s: list[float] = field(default_factory=list)
    """How long after its planned time each was sent."""
    took_s: float = 0.0
    """To the last answer."""

    @property
    def accepted_per_s(self) -> float:
        return len(self.latency_s) / self.took_s

    def note(self, question: Question, head: bytes, body: bytes, latency_s: float) -> None:
        status = head[9:12].decode()
        self.statuses[status] += 1
        if status == "200":
            self.latency_s.append(latency_s)
            queue = _QUEUE.search(head)
            self.queue_s.append(float(queue[1]) / 1e3 if queue else 0.0)
            self.wrong += body != question.answer
        elif status == "429":
            retry_after = _RETRY_AFTER.search(head)
            self.retry_after_s.append(int(retry_after[1]) if retry_after else 0)


def ask_again(port: int, questions: Sequence[Question], *, callers: int, seconds: float) -> Answers:
    """A closed loop: each caller asks as soon as it is answered."""

    async def ask() -> Answers:
        asking = _Asking(port, questions)
        until_s = perf_counter() + seconds

        def again(connection: _Connection) -> None:
            if (now_s := perf_counter()) < until_s:
                asking.ask(connection, now_s)

        asking.then = again
        for _ in range(callers):
            await asking.ask_anew(perf_counter())
        return await asking.all_answered(until_s)

    return asyncio.run(ask())


def ask_when_it_is_time(
    port: int, questions: Sequence[Question], *, per_s: float, seconds: float, seed: int
) -> Answers:
    """An open loop: requests come at random times, so many a second on average, whatever becomes of those before."""
    generator = np.random.default_rng(seed)
    planned_s = np.cumsum(generator.exponential(1 / per_s, int(per_s * seconds)))

    async def ask() -> Answers:
        asking = _Asking(port, questions)
        free: list[_Connection] = []
        asking.then = free.append
        start_s = perf_counter()
        for at_s in (start_s + planned_s).tolist():
            await asyncio.sleep(max(0.0, at_s - perf_counter()))  # a client that is late reads answers all the same
            while free and free[-1].is_closed:
                free.pop()
            if free:
                asking.ask(free.pop(), at_s)
            else:
                asking.begin(at_s)
        return await asking.all_answered(perf_counter())

    return asyncio.run(ask())


@final
class _Asking:
    """All the connections of a loop."""

    def __init__(self, port: int, questions: Sequence[Question]) -> None:
        self._port = port
        self._questions = itertools.cycle(questions)
        self._answers = Answers()
        self._start_s = perf_counter()
        self._open: set[_Connection] = set()
        self._beginning: set[asyncio.Task[None]] = set()
        self._unanswered = 0
        self._answered = asyncio.Event()
        self.then: Callable[[_Connection], object] = lambda _: None
        """Is called with a connection that is free again."""

    def ask(self, connection: _Connection, planned_s: float) -> None:
        self._unanswered += 1
        self._answers.late_s.append(perf_counter() - planned_s)
        connection.ask(next(self._questions), planned_s)

    async def ask_anew(self, planned_s: float) -> None:
        """Over a new connection."""
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._note), "127.0.0.1", self._port
        )
        self._open.add(connection)
        self.ask(connection, planned_s)

    def begin(self, planned_s: float) -> None:
        """The same, without waiting until it is there."""
        task = asyncio.create_task(self.ask_anew(planned_s))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def all_answered(self, until_s: float) -> Answers:
        """What came back until then, and to the last request, and `LAST_ANSWER_S` after it at the latest."""
        await asyncio.sleep(max(0.0, until_s - perf_counter()))
        await asyncio.gather(*self._beginning)
        try:
            async with asyncio.timeout(LAST_ANSWER_S):
                while self._unanswered:
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            self._answers.statuses["silent"] += self._unanswered
        self._answers.took_s = perf_counter() - self._start_s
        for connection in self._open:
            connection.close()
        return self._answers

    def _note(self, connection: _Connection, head: bytes, body: bytes) -> None:
        self._unanswered -= 1
        self._answered.set()
        if head:
            self._answers.note(connection.question, head, body, perf_counter() - connection.planned_s)
            self.then(connection)
        else:
            self._answers.statuses["closed"] += 1


@final
class _Connection(asyncio.Protocol):
    """One request at a time."""

    question: Question
    planned_s: float
    _transport: asyncio.Transport

    def __init__(self, note: Callable[[_Connection, bytes, bytes], None]) -> None:
        self._note = note
        """Is called with the head and the body of each answer; both are empty where the connection was closed."""
        self._came = b""
        self._waits = False
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, question: Question, planned_s: float) -> None:
        self.question, self.planned_s, self._waits = question, planned_s, True
        self._transport.write(question.request)

    def data_received(self, data: bytes) -> None:
        self._came += data
        head_end = self._came.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(self._came, 0, head_end) if head_end >= 4 else None
        if length is None or len(self._came) < head_end + int(length[1]):
            return
        answer, self._came, self._waits = self._came, b"", False
        self._note(self, answer[:head_end], answer[head_end:])

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if self._waits:
            self._waits = False
            self._note(self, b"", b"")

    def close(self) -> None:
        self._transport.close()
