"""The spare, with processes that do what a test says: whoever is started is taken or dismissed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from service.workers import spare as module
from service.workers.process import Process
from service.workers.spare import Spare


class Fake:
    """A process that ends when it is told to."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self.dismissed = 0

    @property
    def ended(self) -> bool:
        return self._over.is_set()

    def end(self) -> None:
        self._over.set()

    async def wait(self) -> str:
        await self._over.wait()
        return "ended with code 1"


class House:
    """What a spare is made of, and what became of each."""

    def __init__(self) -> None:
        self.started: list[Fake] = []
        self.fails: Exception | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.spare = Spare(self._start, cast("Callable[[Process], Awaitable[str]]", self._dismiss))

    async def _start(self) -> Process:
        if self.fails is not None:
            raise self.fails
        fake = Fake()
        self.started.append(fake)
        await self.may_start.wait()
        return cast("Process", fake)

    async def _dismiss(self, fake: Fake) -> str:
        fake.end()
        fake.dismissed += 1
        return await fake.wait()

    async def until(self, count: int) -> None:
        while len(self.started) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def taken(self) -> Any:
        return await self.spare.taken()


def played(scenario: Callable[[House], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(scenario(House()), timeout=20)

    asyncio.run(run())


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """In seconds, as they were asked for; none takes long here."""
    asked: list[float] = []
    sleep = asyncio.sleep

    async def short(seconds: float) -> None:
        if seconds >= module.LEAST_PAUSE_S:
            asked.append(seconds)
        await sleep(min(seconds, 0.01))

    monkeypatch.setattr(asyncio, "sleep", short)
    return asked


def test_it_is_there_until_it_is_taken() -> None:
    async def scenario(house: House) -> None:
        assert await house.spare.taken() is None
        for count in (1, 2):
            house.spare.want()
            house.spare.want()
            await house.until(count)
            taken = await house.taken()
            assert taken is house.started[-1]
            assert await house.spare.taken() is None
            taken.end()  # as a worker, which is no matter of the spare's
            await asyncio.sleep(0.05)
            assert (len(house.started), taken.dismissed) == (count, 0)

    played(scenario)


def test_one_that_ends_is_followed_by_another_with_growing_pauses(
    pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(house: House) -> None:
        house.spare.want()
        for count in range(1, 6):
            await house.until(count)
            house.started[-1].end()
        await house.until(6)
        assert [one.dismissed for one in house.started] == [1, 1, 1, 1, 1, 0]
        assert await house.taken() is house.started[-1]

    with caplog.at_level(logging.WARNING):
        played(scenario)
    assert pauses == [1, 1, 2, 4, 8]
    assert "which replaces a worker that dies, ended with code 1; the next is begun in 8 s" in caplog.text


def test_a_dead_one_is_not_taken() -> None:
    async def scenario(house: House) -> None:
        house.spare.want()
        await house.until(1)
        house.started[0].end()
        assert await house.spare.taken() is None
        assert house.started[0].dismissed

    played(scenario)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(11, "Resource temporarily unavailable"), "cannot be started: Resource temporarily unavailable"),
        (ValueError("who knows"), "ValueError: who knows"),
    ],
)
def test_one_that_cannot_be_started_is_tried_again(
    error: Exception, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And keeps nobody from being started without it."""

    async def scenario(house: House) -> None:
        house.fails = error
        house.spare.want()
        await asyncio.sleep(0.05)
        assert await house.spare.taken() is None
        house.spare.want()
        await asyncio.sleep(0.05)
        house.fails = None
        await house.until(1)
        assert await house.taken() is house.started[0]

    with caplog.at_level(logging.WARNING):
        played(scenario)
    assert said in caplog.text


def test_who_is_cancelled_while_it_takes_one_leaves_it_to_the_next() -> None:
    """As at the end of the service, which dismisses it then."""

    async def scenario(house: House) -> None:
        house.may_start.clear()
        house.spare.want()
        await house.until(1)
        taking = asyncio.create_task(house.spare.taken())
        await asyncio.sleep(0.01)
        taking.cancel()
        await asyncio.wait([taking])
        house.may_start.set()
        assert await house.taken() is house.started[0]
        assert len(house.started) == 1

    played(scenario)
