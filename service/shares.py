"""So many requests a second, for whoever tells of them in words.

Rule 1: an error is not lost among answers, nor a failure of the service among what callers did wrong, such as wrong
        keys that somebody tries: each has its own share.
Rule 2: a second begins with who takes first, so that an idle service has no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import final

SECOND_S = 1.0


@final
class Shares:
    """Belongs to one event loop."""

    def __init__(self, per_second: int, ended: Callable[[], None]) -> None:
        """
        Args:
            per_second: of answers, and as many again of each of the two kinds of error.
            ended: is called when a second is over.
        """
        self._per_second = per_second
        self._ended = ended
        self._left = _full(per_second)
        self._second: asyncio.TimerHandle | None = None

    def has(self, status: int) -> bool:
        """There is one left, in this second, for requests that end like this."""
        return self._left[_kind(status)] > 0

    def take(self, status: int) -> bool:
        """One of them, if there is one left."""
        if not self.has(status):
            return False
        self._left[_kind(status)] -= 1
        if self._second is None:
            self._second = asyncio.get_running_loop().call_later(SECOND_S, self._end_second)
        return True

    def close(self) -> None:
        """The second is over now."""
        if self._second is not None:
            self._second.cancel()
            self._end_second()

    def _end_second(self) -> None:
        self._second = None
        self._left = _full(self._per_second)
        self._ended()


def _kind(status: int) -> int:
    """2: an answer, 4: its caller's error, 5: the service's."""
    return 2 if status < 400 else status // 100


def _full(per_second: int) -> dict[int, int]:
    return dict.fromkeys((2, 4, 5), per_second)
