"""The access log: a line for a request.

Rule 1: sampled, it costs nothing that grows with the load: so many lines a second are written, the rest is told in one
        line at the end of that second. How many those were is known from what is counted anyhow.
Rule 2: who only asks whether the service lives and what it counted is told of only if all is, or if the answer is no.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, final

from service.counts import Counts
from service.headers import Headers
from service.shares import Shares
from service.watch import Ended

AccessLogChoice = Literal["off", "errors", "sampled", "all"]

LINES_S = 10
"""Lines in a second of answers, and as many again of each of the two kinds of error."""

_ASKED_OFTEN = ("/v2/health/", "/metrics", "/docs")

_log = logging.getLogger(__name__)


@final
class AccessLog:
    """Belongs to one event loop."""

    def __init__(self, choice: AccessLogChoice, counts: Counts, lines_s: int = LINES_S) -> None:
        self._choice = choice
        self._counts = counts
        self._told = counts.answered
        """Answered predictions that were written or told of."""
        self._wake: Callable[[], None] = lambda: None
        self._lines = Shares(lines_s, self._end_second)
        self._unwritten: dict[int, int] = {}
        """By status, in this second, without answered predictions."""

    def wakes(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    @property
    def hears(self) -> bool:
        return self._choice == "all" or (self._choice == "sampled" and self._lines.has(200))

    def wants_answer(self, headers: Headers) -> bool:
        if self._choice == "all":
            return True
        if self._choice != "sampled" or not self._lines.take(200):
            return False
        self._told += 1
        return True

    def wants(self, status: int, route: str, headers: Headers) -> bool:
        if self._choice == "all":
            return True
        if status < 400 and (self._choice != "sampled" or route.startswith(_ASKED_OFTEN)):
            return False
        if self._lines.take(status):
            return True
        self._unwritten[status] = self._unwritten.get(status, 0) + 1
        return False

    def tell(self, ended: Ended) -> None:
        duration_ms = (ended.ended_ns - ended.began_ns) / 1e6
        of = f" {ended.model}/{ended.version}" if ended.model else ""
        code = f" {ended.code}" if ended.code else ""
        fields: dict[str, object] = {
            "request_id": ended.request_id,
            "method": ended.method,
            "route": ended.route,
            "model": ended.model,
            "version": ended.version,
            "status": ended.status,
            "code": ended.code,
            "duration_ms": round(duration_ms, 3),
            "client": ended.client[0] if ended.client else "",
        }
        if ended.submitted_ns:
            fields["queue_ms"] = round(ended.queue_ns / 1e6, 3)
            fields["compute_ms"] = round(ended.compute_ns / 1e6, 3)
            fields["rows"] = ended.rows
        if trace_id := _trace_id(ended.trace.get("traceparent", "")):
            fields["trace_id"] = trace_id
        _log.log(
            logging.WARNING if ended.status >= 500 else logging.INFO,
            "%s %s%s %d%s %.3f ms %s",
            ended.method or "-",
            ended.route,
            of,
            ended.status,
            code,
            duration_ms,
            ended.request_id,
            extra={"fields": {name: value for name, value in fields.items() if value != ""}},
        )

    def close(self) -> None:
        self._lines.close()

    def _end_second(self) -> None:
        unwritten, self._unwritten = self._unwritten, {}
        if self._choice == "sampled" and (answered := self._counts.answered - self._told):
            unwritten[200] = unwritten.get(200, 0) + answered
            self._told += answered
        self._wake()
        if unwritten:
            _log.info(
                "%d more requests, by status: %s",
                sum(unwritten.values()),
                ", ".join(f"{status}: {count}" for status, count in sorted(unwritten.items())),
                extra={"fields": {"unwritten": {str(status): count for status, count in sorted(unwritten.items())}}},
            )


def _trace_id(traceparent: str) -> str:
    """The trace that the caller is in, or nothing."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 and parts[1].isalnum() else ""
