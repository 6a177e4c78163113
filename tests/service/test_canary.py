"""Ready means that the engine answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from service import canary as canaries
from service import coalescing
from service.canary import LATELY_S, OVERDUE_S, Canary
from service.coalescing import Coalescer
from service.errors import NotReady
from service.statistics import Statistics
from tests.fakes import FakeRuntime
from tests.service.test_coalescing import accepted, submitted

Pass = Callable[[float], None]
"""Lets seconds pass on the clock that canary and coalescer look at."""


@pytest.fixture
def pass_s(monkeypatch: pytest.MonkeyPatch) -> Pass:
    ahead_s = 0.0

    def clock_ns() -> int:
        return time.perf_counter_ns() + int(ahead_s * 1e9)

    def pass_s(seconds: float) -> None:
        nonlocal ahead_s
        ahead_s += seconds

    monkeypatch.setattr(canaries, "perf_counter_ns", clock_ns)
    monkeypatch.setattr(coalescing, "perf_counter_ns", clock_ns)
    return pass_s


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks waits for 10 ms, where no answer comes."""
    monkeypatch.setattr(canaries, "MOMENT_S", 0.01)


def canary(runtime: FakeRuntime, *, inline: bool = False, run_s: float = 0.0) -> tuple[Canary, Coalescer]:
    coalescer = Coalescer(runtime, max_rows=4, inline_rows=4 if inline else 0, max_waiting_rows=2)
    return Canary(coalescer, accepted(1), run_s=run_s), coalescer


def test_a_model_that_ran_lately_is_not_asked(pass_s: Pass) -> None:
    runtime = FakeRuntime()

    async def scenario() -> None:
        one, _ = canary(runtime)
        pass_s(LATELY_S / 2)
        await one.check()

    asyncio.run(scenario())
    assert runtime.batches == []


def test_a_model_that_did_not_is_asked_each_time(pass_s: Pass) -> None:
    runtime = FakeRuntime()

    async def scenario() -> None:
        one, _ = canary(runtime, inline=True)
        for _ in range(2):
            pass_s(LATELY_S)
            await one.check()

    asyncio.run(scenario())
    assert runtime.batches == [1, 1]


@pytest.mark.usefixtures("impatient")
def test_a_stuck_engine_is_not_ready_and_is_again_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch, pass_s: Pass
) -> None:
    """Yes while it may only be slow, no when it is overdue; one sample is on its way, not one for each probe. Nobody
    waits for the run, so that it is known to be stuck."""
    monkeypatch.setattr(FakeRuntime, "stop", lambda self: None)
    runtime = FakeRuntime()
    runtime.comes_back.clear()

    async def scenario() -> None:
        one, coalescer = canary(runtime)
        pass_s(LATELY_S)
        await one.check()
        await asyncio.to_thread(runtime.started.wait)
        pass_s(OVERDUE_S)
        coalescer.drop_late()
        pass_s(1)
        assert coalescer.unwanted_s > 1
        for _ in range(3):
            with pytest.raises(NotReady, match="has not answered a sample for"):
                await one.check()
        assert not one.answers
        runtime.comes_back.set()
        await submitted(coalescer, accepted(0))
        pass_s(LATELY_S)
        monkeypatch.setattr(canaries, "MOMENT_S", 10.0)
        await one.check()
        assert one.answers

    asyncio.run(scenario())
    assert runtime.batches == [1, 2, 1]


@pytest.mark.usefixtures("impatient")
def test_a_model_that_takes_long_by_itself_is_not_stuck(pass_s: Pass) -> None:
    """Until it takes twenty times as long as it did."""
    runtime = FakeRuntime()
    runtime.comes_back.clear()

    async def scenario() -> None:
        one, _ = canary(runtime, run_s=1)
        pass_s(LATELY_S)
        await one.check()
        pass_s(15)
        await one.check()
        pass_s(5)
        with pytest.raises(NotReady):
            await one.check()
        runtime.comes_back.set()

    asyncio.run(scenario())


def test_a_model_that_fails_on_what_it_could_is_not_ready(pass_s: Pass) -> None:
    async def scenario() -> None:
        one, _ = canary(FakeRuntime(chokes_on=1.0), inline=True)
        pass_s(LATELY_S)
        with pytest.raises(NotReady, match="fails on a sample that it was admitted with"):
            await one.check()

    asyncio.run(scenario())


def test_no_statistics_know_of_the_sample(pass_s: Pass) -> None:
    """Alone, and in a batch with requests of others, which are counted."""
    runtime, statistics = FakeRuntime(), Statistics()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=8, inline_rows=0, statistics=statistics)
        one = Canary(coalescer, accepted(1), run_s=0.0)
        pass_s(LATELY_S)
        await one.check()
        assert statistics.document(name="m", version="1")["execution_count"] == 0
        runtime.started.clear()
        runtime.comes_back.clear()
        running = submitted(coalescer, accepted(0))
        await asyncio.to_thread(runtime.started.wait)
        pass_s(LATELY_S)
        asked = asyncio.create_task(one.check())
        await asyncio.sleep(0)
        other = submitted(coalescer, accepted(0))
        runtime.comes_back.set()
        await asyncio.gather(running, other, asked)

    asyncio.run(scenario())
    assert runtime.batches == [1, 1, 2]
    said = statistics.document(name="m", version="1")
    assert (said["inference_count"], said["execution_count"]) == (2, 2)
    assert said["inference_stats"]["compute_infer"]["count"] == 2
    assert statistics.counts.batch_rows.sum == 2


@pytest.mark.usefixtures("impatient")
def test_a_full_queue_behind_a_stuck_engine_is_not_ready(monkeypatch: pytest.MonkeyPatch, pass_s: Pass) -> None:
    runtime = FakeRuntime()
    runtime.comes_back.clear()

    async def scenario() -> None:
        one, coalescer = canary(runtime)
        running = submitted(coalescer, accepted(0))
        await asyncio.to_thread(runtime.started.wait)
        waiting = [submitted(coalescer, accepted(0)) for _ in range(2)]
        pass_s(LATELY_S)
        await one.check()
        pass_s(OVERDUE_S)
        with pytest.raises(NotReady):
            await one.check()
        runtime.comes_back.set()
        await asyncio.gather(running, *waiting)
        pass_s(LATELY_S)
        monkeypatch.setattr(canaries, "MOMENT_S", 10.0)
        await one.check()  # and it is asked again, once there is room
        assert one.answers

    asyncio.run(scenario())
    assert sum(runtime.batches) == 4
