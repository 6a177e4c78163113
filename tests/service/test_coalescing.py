"""Rows that wait at the same moment run as one batch; nobody waits for company, nobody is lost."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.coalescing import Coalescer, plan
from service.signature import Accepted
from tests.fakes import FakeRuntime


def accepted(value: float, rows: int = 1) -> Accepted:
    return Accepted(tensors=(np.full((rows, 3), value, np.float32),), rows=rows)


@pytest.mark.parametrize(
    ("waiting", "max_rows", "count"),
    [
        ([], 4, 0),
        ([1], 4, 1),
        ([1, 1, 1, 1, 1], 4, 4),
        ([3, 2], 4, 1),
        ([9], 4, 1),
        ([9, 1], 4, 1),
        ([1, 9], 4, 1),
        ([1, 1], 1, 1),
    ],
)
def test_plan(waiting: list[int], max_rows: int, count: int) -> None:
    """First come first, up to the most rows, and a request that is larger by itself runs alone."""
    assert plan(waiting, max_rows) == count


@given(st.lists(st.integers(1, 20)), st.integers(1, 16))
def test_plan_loses_nobody(waiting: list[int], max_rows: int) -> None:
    """Planned again and again, everyone runs once, in order, and only a lone giant exceeds the most rows."""
    left = list(waiting)
    while left:
        count = plan(left, max_rows)
        assert count >= 1
        assert sum(left[:count]) <= max_rows or count == 1
        assert count == len(left) or sum(left[: count + 1]) > max_rows  # nobody is left behind without need
        left = left[count:]


@pytest.mark.parametrize("inline", [True, False])
def test_requests_of_one_moment_run_together(inline: bool) -> None:
    """Each gets its own rows of the common batch."""
    runtime = FakeRuntime()

    async def scenario() -> list[float]:
        coalescer = Coalescer(runtime, max_rows=64, inline=inline)
        answers = await asyncio.gather(*(coalescer.submit(accepted(i, rows=1 + i % 3)) for i in range(10)))
        assert [answer[0].shape[0] for answer in answers] == [1 + i % 3 for i in range(10)]
        return [float(answer[0][0, 0]) for answer in answers]

    assert asyncio.run(scenario()) == [2.0 * i for i in range(10)]
    assert runtime.batches == [19]


def test_a_lone_request_never_waits() -> None:
    """There is no timer: one request alone runs in the very next turn of the loop."""
    runtime = FakeRuntime()

    async def scenario() -> None:
        answer = Coalescer(runtime, max_rows=64, inline=True).submit(accepted(1))
        await asyncio.sleep(0)
        assert answer.done()

    asyncio.run(scenario())


def test_a_model_that_mixing_would_change_never_mixes() -> None:
    runtime = FakeRuntime()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=1, inline=True)
        await asyncio.gather(*(coalescer.submit(accepted(i)) for i in range(5)))

    asyncio.run(scenario())
    assert runtime.batches == [1, 1, 1, 1, 1]


def test_one_request_that_fails_does_not_fail_its_neighbours() -> None:
    """The batch is run again request by request, and only the guilty one hears of it."""
    runtime = FakeRuntime(chokes_on=3.0)

    async def scenario() -> list[object]:
        coalescer = Coalescer(runtime, max_rows=64, inline=True)
        return list(await asyncio.gather(*(coalescer.submit(accepted(i)) for i in range(5)), return_exceptions=True))

    results = asyncio.run(scenario())
    assert [isinstance(result, Exception) for result in results] == [False, False, False, True, False]


def test_whoever_has_gone_costs_nothing() -> None:
    """A cancelled request is dropped before its batch is put together."""
    runtime = FakeRuntime()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline=True)
        gone, stays = coalescer.submit(accepted(1, rows=5)), coalescer.submit(accepted(2))
        gone.cancel()
        assert (await stays)[0].shape == (1, 3)

    asyncio.run(scenario())
    assert runtime.batches == [1]


def test_a_long_model_leaves_the_loop_free() -> None:
    """While it runs in its thread the loop answers others, and those that arrive form the next batch."""
    runtime = FakeRuntime(run_s=0.2)

    async def scenario() -> float:
        coalescer = Coalescer(runtime, max_rows=64, inline=False)
        first = coalescer.submit(accepted(1))
        await asyncio.to_thread(runtime.started.wait)
        start = time.perf_counter()
        later = [coalescer.submit(accepted(i)) for i in range(4)]
        await asyncio.sleep(0)
        turn_s = time.perf_counter() - start
        await asyncio.gather(first, *later)
        return turn_s

    turn_s = asyncio.run(scenario())
    assert runtime.batches == [1, 4]
    assert threading.get_ident() not in runtime.threads
    assert turn_s < 0.1  # the loop turned while the model slept for 0.2 s


def test_whoever_leaves_while_it_runs_does_not_harm_the_others() -> None:
    """The batch is under way; the answer of the one who left is thrown away, the others get theirs."""
    runtime = FakeRuntime(run_s=0.05)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline=False)
        gone, stays = coalescer.submit(accepted(1)), coalescer.submit(accepted(2))
        await asyncio.to_thread(runtime.started.wait)
        gone.cancel()
        assert float((await asyncio.wait_for(stays, timeout=5))[0][0, 0]) == 4.0
        assert float((await asyncio.wait_for(coalescer.submit(accepted(3)), timeout=5))[0][0, 0]) == 6.0

    asyncio.run(scenario())
    assert runtime.batches == [2, 1]


def test_the_loop_turns_between_batches() -> None:
    """A long queue of short batches does not keep health checks waiting until it is empty."""
    runtime = FakeRuntime()

    async def scenario() -> int:
        coalescer = Coalescer(runtime, max_rows=1, inline=True)
        answers = [coalescer.submit(accepted(i)) for i in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        done_early = sum(answer.done() for answer in answers)
        await asyncio.gather(*answers)
        return done_early

    assert 0 < asyncio.run(scenario()) < 10
