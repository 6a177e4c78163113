"""Who watches requests: counts for all of them, and whoever wants to hear of one in words (a log, a trace).

Rule 1: an answered prediction pays for one look at whether anybody hears; what is said then is only put together if
        somebody wants it. Whoever hears no more is not asked again until it says so.
Rule 2: nothing of a request is told but what stands in `Ended`: no header, no body, no path that a caller made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol, final

from service.counts import Counts
from service.headers import Headers

ELSEWHERE = "other"
"""The route of what leads nowhere, or was not even HTTP."""

Client = tuple[str, int] | None
"""The address of who asked; None if it is not known."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A request that was answered."""

    request_id: str
    method: str
    route: str
    status: int
    code: str = ""
    """Of the error, if it is one."""
    model: str = ""
    version: str = ""
    began_ns: int
    """When its last byte was read, or, where that is not known, its head; on the clock of `perf_counter_ns`."""
    ended_ns: int
    submitted_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    """All three 0 if nothing was computed."""
    rows: int = 0
    client: Client = None
    trace: Mapping[str, str]
    """What the caller said of its trace: the headers `traceparent` and `tracestate`."""


class Watcher(Protocol):
    """Hears of requests in words."""

    @property
    def hears(self) -> bool:
        """Whether it may want to hear of answered predictions. Once it does not, nobody asks before it wakes."""
        ...

    def wants(self, status: int, route: str, headers: Headers) -> bool:
        """Whether it wants to hear of a request that is no answered prediction; asked once for each."""
        ...

    def wants_answer(self, headers: Headers) -> bool:
        """Whether it wants to hear of an answered prediction; asked once for each, while it hears."""
        ...

    def wakes(self, wake: Callable[[], None]) -> None:
        """What it calls when it hears again."""
        ...

    def tell(self, ended: Ended) -> None: ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


@final
class Watch:
    """All who watch the requests of one process."""

    def __init__(self, counts: Counts, *watchers: Watcher) -> None:
        self.counts = counts
        self._watchers = watchers
        self.hearing: Sequence[Watcher] = watchers
        """Those who hear of answered predictions."""
        for watcher in watchers:
            watcher.wakes(self._wake)

    def _wake(self) -> None:
        self.hearing = self._watchers

    def wanting_answer(self, headers: Headers) -> Sequence[Watcher]:
        """Those who want to hear of an answered prediction."""
        wanting = [watcher for watcher in self.hearing if watcher.wants_answer(headers)]
        self.hearing = [watcher for watcher in self.hearing if watcher.hears]
        return wanting

    def wanting(self, status: int, route: str, headers: Headers) -> Sequence[Watcher]:
        """Those who want to hear of a request that is no answered prediction."""
        return [watcher for watcher in self._watchers if watcher.wants(status, route, headers)]

    def refused_unread(self, status: int, code: str, given: bytes, client: Client) -> None:
        """What came was no request that could be read to its end, and got this status."""
        self.counts.ended(ELSEWHERE, status, reason=code)
        now_ns = perf_counter_ns()
        for watcher in self.wanting(status, ELSEWHERE, {}):
            watcher.tell(
                Ended(
                    request_id=given.decode(),
                    method="",
                    route=ELSEWHERE,
                    status=status,
                    code=code,
                    began_ns=now_ns,
                    ended_ns=now_ns,
                    client=client,
                    trace={},
                )
            )

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.close()
