"""The next request of a lone caller is looked for, and who does not come costs nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import cast

import pytest

from service import busy_polling
from service.busy_polling import MOMENT_S, PASSED_OVER, BusyPolling


class Turning:
    """An event loop that turns when it is told to, and a clock."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.soon: deque[Callable[[], None]] = deque()

    def call_soon(self, callback: Callable[..., None], *given: object) -> None:
        self.soon.append(lambda: callback(*given))

    def turn(self, *, s: float) -> None:
        """Once, and so much time passes."""
        for _ in range(len(self.soon)):
            self.soon.popleft()()
        self.now_s += s

    def turns(self) -> int:
        """How often it turns before it sleeps."""
        count = 0
        while self.soon:
            self.turn(s=MOMENT_S / 10)
            count += 1
            assert count < 1000
        return count


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Turning:
    made = Turning()
    monkeypatch.setattr(busy_polling, "perf_counter", lambda: made.now_s)
    return made


class Caller:
    """Whom an answer goes to."""

    def __init__(self, polling: BusyPolling, loop: Turning) -> None:
        self._polling = polling
        self._loop = cast(asyncio.AbstractEventLoop, loop)

    def answered(self) -> None:
        self._polling.answered(self, self._loop)


@pytest.fixture
def polling() -> BusyPolling:
    return BusyPolling()


@pytest.fixture
def caller(polling: BusyPolling, loop: Turning) -> Caller:
    """Answered once."""
    made = Caller(polling, loop)
    made.answered()
    polling.received()
    assert not loop.soon
    return made


def test_a_caller_that_is_back_at_once_is_awaited_awake_each_time(
    loop: Turning, polling: BusyPolling, caller: Caller
) -> None:
    for _ in range(50):
        caller.answered()
        for _ in range(5):
            loop.turn(s=MOMENT_S / 10)
        assert len(loop.soon) == 1  # it looks, and once
        polling.received()
    assert loop.turns() == 1


def test_nobody_is_looked_for_longer_than_a_moment(loop: Turning, polling: BusyPolling, caller: Caller) -> None:
    caller.answered()
    assert 10 <= loop.turns() <= 12


def test_who_was_not_back_is_passed_over_for_a_while(loop: Turning, polling: BusyPolling, caller: Caller) -> None:
    caller.answered()
    loop.turns()
    for _ in range(PASSED_OVER):
        polling.received()
        caller.answered()
        assert not loop.soon
    polling.received()
    caller.answered()
    assert loop.soon


def test_what_comes_while_it_looks_ends_the_looking(loop: Turning, polling: BusyPolling, caller: Caller) -> None:
    """A request whose answer takes long is not looked for meanwhile; nor is its caller passed over for that."""
    caller.answered()
    polling.received()
    assert loop.turns() == 1
    caller.answered()
    assert loop.soon


def test_among_several_nobody_is_looked_for(loop: Turning, polling: BusyPolling, caller: Caller) -> None:
    """But one that asks now and then keeps nobody else from being alone."""
    other = Caller(polling, loop)
    for one in (other, caller, other, caller):
        one.answered()
        polling.received()
    assert not loop.soon
    caller.answered()
    assert loop.soon
