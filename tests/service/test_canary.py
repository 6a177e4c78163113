"""Ready means that the engine answers."""

from __future__ import annotations

import asyncio
import time

import pytest

from service import canary as canaries
from service.canary import Canary
from service.coalescing import Coalescer
from service.errors import NotReady
from service.statistics import Statistics
from tests.fakes import FakeRuntime
from tests.service.test_coalescing import accepted, submitted


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing counts as lately, an answer is overdue after 50 ms, and who asks waits for 10."""
    monkeypatch.setattr(canaries, "LATELY_S", 0.0)
    monkeypatch.setattr(canaries, "OVERDUE_S", 0.05)
    monkeypatch.setattr(canaries, "MOMENT_S", 0.01)


def canary(runtime: FakeRuntime, *, inline: bool = False, run_s: float = 0.0) -> tuple[Canary, Coalescer]:
    coalescer = Coalescer(runtime, max_rows=4, inline_rows=4 if inline else 0, max_waiting_rows=2)
    return Canary(coalescer, accepted(1), run_s=run_s), coalescer


def test_a_model_that_ran_lately_is_not_asked() -> None:
    runtime = FakeRuntime()

    async def scenario() -> None:
        one, _ = canary(runtime)
        await one.check()

    asyncio.run(scenario())
    assert runtime.batches == []


@pytest.mark.usefixtures("at_once")
def test_a_model_that_did_not_is_asked_each_time() -> None:
    runtime = FakeRuntime()

    async def scenario() -> None:
        one, _ = canary(runtime, inline=True)
        await one.check()
        await one.check()

    asyncio.run(scenario())
    assert runtime.batches == [1, 1]


@pytest.mark.usefixtures("at_once")
def test_a_stuck_engine_is_not_ready_and_is_again_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yes while it may only be slow, no when it is overdue; one sample is on its way, not one for each probe. Nobody
    waits for the run, so that it is known to be stuck."""
    monkeypatch.setattr(FakeRuntime, "stop", lambda self: None)
    runtime = FakeRuntime(run_s=0.2)

    async def scenario() -> None:
        one, coalescer = canary(runtime)
        await one.check()
        await asyncio.sleep(0.06)
        assert coalescer.unwanted_s > 0
        for _ in range(3):
            with pytest.raises(NotReady, match="has not answered a sample for 0 s"):
                await one.check()
        assert not one.answers
        await asyncio.sleep(0.15)
        runtime.run_s = 0.0
        await one.check()
        assert one.answers

    asyncio.run(scenario())
    assert runtime.batches == [1, 1]


@pytest.mark.usefixtures("at_once")
def test_a_model_that_takes_long_by_itself_is_not_stuck() -> None:
    runtime = FakeRuntime(run_s=0.1)

    async def scenario() -> None:
        one, _ = canary(runtime, run_s=0.1)
        await one.check()
        await asyncio.sleep(0.06)
        await one.check()

    asyncio.run(scenario())


@pytest.mark.usefixtures("at_once")
def test_a_model_that_fails_on_what_it_could_is_not_ready() -> None:
    async def scenario() -> None:
        one, _ = canary(FakeRuntime(chokes_on=1.0), inline=True)
        with pytest.raises(NotReady, match="fails on a sample that it was admitted with"):
            await one.check()

    asyncio.run(scenario())


@pytest.mark.usefixtures("at_once")
def test_no_statistics_know_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and in a batch with requests of others, which are counted."""
    monkeypatch.setattr(canaries, "OVERDUE_S", 5.0)
    runtime, statistics = FakeRuntime(), Statistics()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=8, inline_rows=0, statistics=statistics)
        one = Canary(coalescer, accepted(1), run_s=0.0)
        await one.check()
        assert statistics.document(name="m", version="1")["execution_count"] == 0
        runtime.run_s = 0.05
        runtime.started.clear()
        running = submitted(coalescer, accepted(0))
        await asyncio.to_thread(runtime.started.wait)
        asked = asyncio.create_task(one.check())
        await asyncio.sleep(0)
        await asyncio.gather(running, submitted(coalescer, accepted(0)), asked)

    asyncio.run(scenario())
    assert runtime.batches == [1, 1, 2]
    said = statistics.document(name="m", version="1")
    assert (said["inference_count"], said["execution_count"]) == (2, 2)
    assert said["inference_stats"]["compute_infer"]["count"] == 2
    assert statistics.counts.batch_rows.sum == 2


@pytest.mark.usefixtures("at_once")
def test_a_full_queue_behind_a_stuck_engine_is_not_ready() -> None:
    async def scenario() -> None:
        runtime = FakeRuntime(run_s=0.3)
        one, coalescer = canary(runtime)
        running = submitted(coalescer, accepted(0))
        await asyncio.to_thread(runtime.started.wait)
        waiting = [submitted(coalescer, accepted(0)) for _ in range(2)]
        await one.check()
        await asyncio.sleep(0.06)
        with pytest.raises(NotReady):
            await one.check()
        await asyncio.gather(running, *waiting)
        await one.check()  # and it is asked again, once there is room

    start = time.perf_counter()
    asyncio.run(scenario())
    assert time.perf_counter() - start < 5
