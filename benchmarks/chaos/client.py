"""Many connections that send what they are given, and note what came back.

Rule 1: an answer that does not come in time, or is cut short, is a failure and not an exception.
Rule 2: a connection is used again as long as the server keeps it.
"""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import final

from benchmarks.chaos.requests import Attempt

ANSWER_LIMIT_S = 20.0
SILENCE_S = 0.3
"""So long is waited for the answer to what may have none."""

PAUSE_S = 0.03
"""Between the parts of what is sent slowly."""

CLOSED, SILENT, LEFT = "closed", "silent", "left"

Drawn = tuple[int, str, Attempt]
"""Its number and kind."""


class Cause(StrEnum):
    """Why something is a failure."""

    WRONG = "a wrong answer"
    STATUS = "an unexpected status"
    SILENCE = "no answer"


@dataclass(frozen=True, slots=True)
class Failure:
    """One of them."""

    cause: Cause
    said: str
    at_s: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Outcome:
    """What came back of everything that was sent."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    """By kind; `closed`, `silent` and `left` among them."""
    failures: list[Failure] = field(default_factory=list)

    def count(self, kind: str, status: str) -> None:
        self.statuses.setdefault(kind, Counter())[status] += 1


def send_all(port: int, drawn: Iterator[Drawn], *, connections: int, outcome: Outcome | None = None) -> Outcome:
    """Send each, from so many connections at once.

    Args:
        outcome: where it is noted.
    """
    outcome = Outcome() if outcome is None else outcome

    async def work() -> None:
        link = Link(port)
        for number, kind, attempt in drawn:
            if failure := await link.make(attempt, lambda status, kind=kind: outcome.count(kind, status)):  # type: ignore[misc]
                outcome.failures.append(replace(failure, said=f"request {number} ({kind}): {failure.said}"))
        link.close()

    async def everybody() -> None:
        await asyncio.gather(*(work() for _ in range(connections)))

    asyncio.run(everybody())
    return outcome


@final
class Link:
    """A connection, opened when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def make(self, attempt: Attempt, count: Callable[[str], None]) -> Failure | None:
        """Send it and read what is answered; says what is wrong with that, if something is."""
        if self._ends is None:
            self._ends = await asyncio.open_connection("127.0.0.1", self._port, limit=2**22)
        reader, writer = self._ends
        with suppress(ConnectionError):
            for i, part in enumerate(attempt.parts):
                if i:
                    await asyncio.sleep(PAUSE_S)
                writer.write(part)
                await writer.drain()
        if attempt.leaves:
            writer.transport.abort()
            self.close()
            count(LEFT)
            return None
        for expected in attempt.expected:
            try:
                limit_s = SILENCE_S if attempt.may_be_silent else ANSWER_LIMIT_S
                status, body, keeps = await asyncio.wait_for(_answer(reader), limit_s)
            except TimeoutError:
                self.close()
                count(SILENT)
                if attempt.may_be_silent:
                    return None
                return Failure(Cause.SILENCE, f"not answered within {limit_s:g} s")
            count(str(status or CLOSED))
            if not keeps:
                self.close()
            failure = _failure(attempt, status, body, expected)
            if failure or not keeps:
                self.close()
                return failure
        if attempt.may_close:
            self.close()
        return None

    def close(self) -> None:
        if self._ends is not None:
            self._ends[1].close()
            self._ends = None


def _failure(attempt: Attempt, status: int, body: bytes, expected: bytes | None) -> Failure | None:
    if not status:
        fine = attempt.may_close and expected is None
        return None if fine else Failure(Cause.SILENCE, "the connection was closed without an answer")
    if expected is None:
        if status in attempt.allowed:
            return None
        return Failure(Cause.STATUS, f"answered {status}, not {sorted(attempt.allowed)}: {body[:200]!r}")
    if status != 200:
        return Failure(Cause.STATUS, f"answered {status} instead of 200: {body[:200]!r}")
    if body != expected:
        return Failure(Cause.WRONG, f"the answer differs: {body[:80]!r}, not {expected[:80]!r}")
    return None


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status, body as it was before compression, and whether the connection stays open; status 0: it was closed."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0, b"", False
    match headers.get("content-encoding"):
        case "gzip":
            body = gzip.decompress(body)
        case "deflate":
            body = zlib.decompress(body)
    return int(lines[0].split()[1]), body, headers.get("connection", "").lower() != "close"
