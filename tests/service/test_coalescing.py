"""Rows that wait at the same moment run as one batch; nobody waits for company, nobody is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service import coalescing
from service.coalescing import ALWAYS_WAIT, Coalescer, Computed, plan
from service.errors import ClientLeft, DeadlineExceeded, QueueFull, RowsRejected, ServerFull
from service.settings import Settings
from service.signature import Accepted
from service.statistics import Statistics
from tests.fakes import FakeRuntime


def accepted(value: float, rows: int = 1) -> Accepted:
    return Accepted(tensors=(np.full((rows, 3), value, np.float32),), rows=rows)


def submitted(
    coalescer: Coalescer,
    rows: Accepted,
    *,
    alone: bool = False,
    expires_ns: int | None = None,
    gone: Callable[[], bool] | None = None,
    begin: Callable[[], None] | None = None,
) -> asyncio.Future[Computed]:
    """What is told, as a future; cancelling it is leaving."""
    answer: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()

    def tell(computed: Computed) -> None:
        if answer.done():
            return
        if computed.error is None:
            answer.set_result(computed)
        else:
            answer.set_exception(computed.error)

    coalescer.submit(
        rows,
        tell,
        alone=alone,
        expires_ns=expires_ns,
        gone=lambda: answer.done() or (gone is not None and gone()),
        begin=begin,
    )
    return answer


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
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=64 if inline else 0)
        answers = await asyncio.gather(*(submitted(coalescer, accepted(i, rows=1 + i % 3)) for i in range(10)))
        assert [answer.outputs[0].shape[0] for answer in answers] == [1 + i % 3 for i in range(10)]
        return [float(answer.outputs[0][0, 0]) for answer in answers]

    assert asyncio.run(scenario()) == [2.0 * i for i in range(10)]
    assert runtime.batches == [19]


def test_a_lone_request_never_waits() -> None:
    """There is no timer: one request alone runs in the very next turn of the loop."""
    runtime = FakeRuntime()

    async def scenario() -> None:
        answer = submitted(Coalescer(runtime, max_rows=64, inline_rows=64), accepted(1))
        await asyncio.sleep(0)
        assert answer.done()

    asyncio.run(scenario())


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("inline", [True, False])
def test_who_may_not_begin_is_told_and_not_computed(alone: bool, inline: bool) -> None:
    """And spoils no batch."""
    runtime = FakeRuntime()

    def refused() -> None:
        raise ServerFull(called="answers", held_bytes=1, max_bytes=1)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=64 if inline else 0)
        answer = submitted(coalescer, accepted(1), alone=alone, begin=refused)
        other = submitted(coalescer, accepted(2), begin=lambda: None)
        assert float((await other).outputs[0][0, 0]) == 4
        with pytest.raises(ServerFull):
            await answer

    asyncio.run(scenario())
    assert runtime.batches == [1]


def test_a_full_batch_does_not_wait_for_the_turn_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many are refused a turn is long, and the engine would rest."""
    happened: list[str] = []

    class Noting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            happened.append("a batch begins")
            return super().submit(*args, **kwargs)

    monkeypatch.setattr(coalescing, "own_thread", lambda name: Noting(1))

    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=1, inline_rows=0)
        loop = asyncio.get_running_loop()

        def tell(_: Computed) -> None:
            loop.call_soon(happened.append, "a turn begins")

        for _ in range(3):
            coalescer.submit(accepted(1), tell)
        await submitted(coalescer, accepted(1))

    asyncio.run(scenario())
    assert happened[:5] == ["a batch begins", "a batch begins", "a turn begins", "a batch begins", "a turn begins"]


def test_a_model_that_mixing_would_change_never_mixes() -> None:
    runtime = FakeRuntime()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=1, inline_rows=64)
        await asyncio.gather(*(submitted(coalescer, accepted(i)) for i in range(5)))

    asyncio.run(scenario())
    assert runtime.batches == [1, 1, 1, 1, 1]


def test_one_request_that_fails_does_not_fail_its_neighbours() -> None:
    """The batch is run again request by request, and only the guilty one hears of it."""
    runtime = FakeRuntime(chokes_on=3.0)

    async def scenario() -> list[object]:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=64)
        return list(
            await asyncio.gather(*(submitted(coalescer, accepted(i)) for i in range(5)), return_exceptions=True)
        )

    results = asyncio.run(scenario())
    assert [isinstance(result, Exception) for result in results] == [False, False, False, True, False]


def test_whoever_has_gone_costs_nothing() -> None:
    """A cancelled request is dropped before its batch is put together."""
    runtime = FakeRuntime()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=64)
        gone, stays = submitted(coalescer, accepted(1, rows=5)), submitted(coalescer, accepted(2))
        gone.cancel()
        assert (await stays).outputs[0].shape == (1, 3)

    asyncio.run(scenario())
    assert runtime.batches == [1]


def test_a_long_model_leaves_the_loop_free() -> None:
    """While it runs in its thread the loop answers others, and those that arrive form the next batch."""
    runtime = FakeRuntime(run_s=0.2)

    async def scenario() -> float:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=0)
        first = submitted(coalescer, accepted(1))
        await asyncio.to_thread(runtime.started.wait)
        start = time.perf_counter()
        later = [submitted(coalescer, accepted(i)) for i in range(4)]
        await asyncio.sleep(0)
        turn_s = time.perf_counter() - start
        await asyncio.gather(first, *later)
        return turn_s

    turn_s = asyncio.run(scenario())
    assert runtime.batches == [1, 4]
    assert threading.get_ident() not in runtime.ran_on
    assert turn_s < 0.1  # the loop turned while the model slept for 0.2 s


def test_whoever_leaves_while_it_runs_does_not_harm_the_others() -> None:
    """The batch is under way; the answer of the one who left is thrown away, the others get theirs."""
    runtime = FakeRuntime(run_s=0.05)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=0)
        gone, stays = submitted(coalescer, accepted(1)), submitted(coalescer, accepted(2))
        await asyncio.to_thread(runtime.started.wait)
        gone.cancel()
        assert float((await asyncio.wait_for(stays, timeout=5)).outputs[0][0, 0]) == 4.0
        assert float((await asyncio.wait_for(submitted(coalescer, accepted(3)), timeout=5)).outputs[0][0, 0]) == 6.0

    asyncio.run(scenario())
    assert runtime.batches == [2, 1]


def test_the_loop_turns_between_batches() -> None:
    """A long queue of short batches does not keep health checks waiting until it is empty."""
    runtime = FakeRuntime()

    async def scenario() -> int:
        coalescer = Coalescer(runtime, max_rows=1, inline_rows=64)
        answers = [submitted(coalescer, accepted(i)) for i in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        done_early = sum(answer.done() for answer in answers)
        await asyncio.gather(*answers)
        return done_early

    assert 0 < asyncio.run(scenario()) < 10


def test_a_request_that_is_alone_does_not_even_wait_for_the_turn() -> None:
    """Its answer is told before `submit` returns; with company under way it is not."""
    runtime = FakeRuntime()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=64)
        assert submitted(coalescer, accepted(1), alone=True).done()
        first = submitted(coalescer, accepted(2))
        second = submitted(coalescer, accepted(3), alone=True)  # the caller was mistaken, and overtakes nobody
        assert not second.done()
        await asyncio.gather(first, second)

    asyncio.run(scenario())
    assert runtime.batches == [1, 2]


def test_a_batch_too_long_for_the_loop_gets_a_thread() -> None:
    """The same model runs a row on the loop and a larger batch beside it."""
    runtime = FakeRuntime()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=2)
        await submitted(coalescer, accepted(1), alone=True)
        assert runtime.ran_on == {threading.get_ident()}
        await submitted(coalescer, accepted(1, rows=3), alone=True)
        assert len(runtime.ran_on) == 2

    asyncio.run(scenario())


def test_a_request_whose_time_is_over_is_not_computed() -> None:
    """It waited behind a long run; those beside it with time left are answered."""
    runtime = FakeRuntime(run_s=0.05)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=0)
        running = submitted(coalescer, accepted(1))
        await asyncio.to_thread(runtime.started.wait)
        now_ns = time.perf_counter_ns()
        late = submitted(coalescer, accepted(2, rows=5), expires_ns=now_ns + 1_000_000)
        in_time = submitted(coalescer, accepted(3), expires_ns=now_ns + 60_000_000_000)
        with pytest.raises(DeadlineExceeded):
            await late
        assert float((await in_time).outputs[0][0, 0]) == 6.0
        await running

    asyncio.run(scenario())
    assert runtime.batches == [1, 1]


def test_a_client_that_hung_up_costs_nothing() -> None:
    runtime = FakeRuntime(run_s=0.05)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=0)
        running = submitted(coalescer, accepted(1))
        await asyncio.to_thread(runtime.started.wait)
        gone = submitted(coalescer, accepted(2, rows=5), gone=lambda: True)
        stays = submitted(coalescer, accepted(3), gone=lambda: False)
        with pytest.raises(ClientLeft):
            await gone
        await asyncio.gather(running, stays)

    asyncio.run(scenario())
    assert runtime.batches == [1, 1]


def test_where_the_time_went_is_told() -> None:
    """Each request says how long it waited and how long its batch ran; the statistics add them up."""
    runtime, statistics = FakeRuntime(run_s=0.02), Statistics()

    async def scenario() -> list[Computed]:
        coalescer = Coalescer(runtime, max_rows=2, inline_rows=0, statistics=statistics)
        return await asyncio.gather(*(submitted(coalescer, accepted(i)) for i in range(4)))

    answers = asyncio.run(scenario())
    assert all(answer.compute_ns >= 20e6 for answer in answers)
    assert all(answer.queue_ns >= 20e6 for answer in answers[2:])  # the second batch waited for the first
    said = statistics.document(name="m", version="1")
    assert (said["inference_count"], said["execution_count"]) == (4, 2)
    assert said["inference_stats"]["compute_infer"]["count"] == 4
    assert [batch["batch_size"] for batch in said["batch_stats"]] == [2]
    assert said["batch_stats"][0]["compute_infer"]["count"] == 2


class LosesRows:
    """Answers only the rows that are positive, as a graph with Compress does."""

    inputs, outputs, provider, threads = FakeRuntime.inputs, FakeRuntime.outputs, "losing", 1

    def stop(self) -> None:
        pass

    def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        (x,) = tensors
        return [x[x[:, 0] > 0]]


def test_nobody_gets_the_answer_of_another_where_a_graph_loses_rows() -> None:
    """A batch that comes back with other rows runs request by request; one that does so alone is refused."""

    async def scenario() -> list[Any]:
        coalescer = Coalescer(LosesRows(), max_rows=64, inline_rows=64)
        asked = [submitted(coalescer, accepted(value)) for value in (1.0, -2.0, 3.0)]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    first, lost, last = asyncio.run(scenario())
    assert [float(first.outputs[0][0, 0]), float(last.outputs[0][0, 0])] == [1.0, 3.0]
    assert isinstance(lost, RowsRejected)
    assert "an output of shape [0, 3] for 1 rows" in str(lost)


def test_one_who_cannot_be_told_does_not_keep_the_others_from_hearing() -> None:
    """The first answer's way back breaks; the second, and the next batch, are told all the same."""
    told: list[int] = []

    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=64, inline_rows=64)

        def broken(_: Computed) -> None:
            raise OSError("the wire is cut")

        for _ in range(2):
            coalescer.submit(accepted(1), broken)
            coalescer.submit(accepted(2), lambda computed: told.append(len(computed.outputs)))
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert told == [1, 1]


def test_a_full_batch_does_not_wait_for_the_turn() -> None:
    """Of ten that come in one turn, eight are answered before it ends, in two full batches."""
    runtime = FakeRuntime()

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=4, inline_rows=4)
        answers = [submitted(coalescer, accepted(i)) for i in range(10)]
        assert [answer.done() for answer in answers] == [True] * 8 + [False] * 2
        assert [float(answer.outputs[0][0, 0]) for answer in await asyncio.gather(*answers)] == [
            2.0 * i for i in range(10)
        ]

    asyncio.run(scenario())
    assert runtime.batches == [4, 4, 2]


def test_a_full_batch_waits_for_the_one_in_the_thread() -> None:
    """One engine call at a time: what fills up meanwhile runs after it."""
    runtime = FakeRuntime(run_s=0.05)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=2, inline_rows=2)
        large = submitted(coalescer, accepted(1, rows=3))
        await asyncio.to_thread(runtime.started.wait)
        small = [submitted(coalescer, accepted(i)) for i in range(4)]
        assert runtime.batches == [3]
        await asyncio.gather(large, *small)

    asyncio.run(scenario())
    assert runtime.batches == [3, 2, 2]


@pytest.mark.parametrize("limit", ["rows", "bytes"])
def test_the_queue_has_an_end(limit: str) -> None:
    """Four wait behind a long run; the fifth is refused at once, and those who wait lose nothing."""
    runtime = FakeRuntime(run_s=0.05)
    row_bytes = accepted(1).tensors[0].nbytes

    async def scenario() -> None:
        coalescer = Coalescer(
            runtime,
            max_rows=64,
            inline_rows=0,
            max_waiting_rows=4 if limit == "rows" else 1000,
            max_waiting_bytes=4 * row_bytes if limit == "bytes" else 10**9,
        )
        running = submitted(coalescer, accepted(0))
        await asyncio.to_thread(runtime.started.wait)
        waiting = [submitted(coalescer, accepted(i)) for i in range(4)]
        with pytest.raises(
            QueueFull, match=rf"4 rows are waiting already; at most \d+ {limit} may wait; try again in 1"
        ):
            submitted(coalescer, accepted(9))
        await asyncio.gather(running, *waiting)
        await submitted(coalescer, accepted(0))  # there is room again

    asyncio.run(scenario())
    assert runtime.batches == [1, 4, 1]


def test_whoever_left_or_was_late_makes_room() -> None:
    runtime = FakeRuntime(run_s=0.05)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=0, max_waiting_rows=2)
        running = submitted(coalescer, accepted(0))
        await asyncio.to_thread(runtime.started.wait)
        late = submitted(coalescer, accepted(1), expires_ns=time.perf_counter_ns() + 1_000_000)
        stays = submitted(coalescer, accepted(2))
        await asyncio.sleep(0.005)
        coalescer.drop_late()
        with pytest.raises(DeadlineExceeded):
            await late
        await asyncio.gather(running, stays, submitted(coalescer, accepted(3)))

    asyncio.run(scenario())
    assert runtime.batches == [1, 2]


def test_who_would_be_late_is_refused_at_once() -> None:
    """A row takes 20 ms, five wait: whoever has 40 ms is told now, and when to come again."""
    runtime = FakeRuntime(run_s=0.02)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=1, inline_rows=0)
        await submitted(coalescer, accepted(0))  # what a row takes has to be found out
        waiting = [submitted(coalescer, accepted(i)) for i in range(6)]
        await asyncio.sleep(0)
        now_ns = time.perf_counter_ns()
        with pytest.raises(
            QueueFull, match=r"the time of this request \('timeout' in it, .*\) would pass while it waits"
        ):
            submitted(coalescer, accepted(9), expires_ns=now_ns + 40_000_000)
        patient = submitted(coalescer, accepted(9), expires_ns=now_ns + 60_000_000_000)
        await asyncio.gather(*waiting, patient)

    asyncio.run(scenario())


def test_a_few_may_always_wait() -> None:
    """A row takes ten seconds and a wait of one is allowed: 32 wait all the same, and the next is told how long."""

    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=1, inline_rows=64, max_wait_s=1, row_s=10)
        waiting = [submitted(coalescer, accepted(i)) for i in range(ALWAYS_WAIT)]
        with pytest.raises(QueueFull, match=r"about 320\.00 s of work; no request may wait longer than 1 s") as refused:
            submitted(coalescer, accepted(9))
        assert refused.value.retry_after_s == 320
        await asyncio.gather(*waiting)

    asyncio.run(scenario())
    assert f"{ALWAYS_WAIT} requests may always wait" in str(Settings.model_fields["max_queue_s"].description)


def test_who_would_wait_longer_than_anybody_may_is_refused() -> None:
    """A row takes 50 ms and a wait of two seconds is allowed: whoever finds up to 40 rows may wait, at 41 nobody."""

    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=1, inline_rows=64, max_wait_s=2, row_s=0.05)
        assert coalescer.max_waiting_rows == 40
        waiting = [submitted(coalescer, accepted(i)) for i in range(41)]
        with pytest.raises(QueueFull, match=r"41 rows are waiting already, about 2\.05 s of work") as refused:
            submitted(coalescer, accepted(9))
        assert refused.value.retry_after_s == 3
        await asyncio.gather(*waiting)
        await submitted(coalescer, accepted(9))

    asyncio.run(scenario())


def test_the_rows_of_a_request_count_for_those_behind_it() -> None:
    """A large one that few wait before is let in; when 32 wait, whoever comes would wait for its rows too."""

    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=64, inline_rows=0, max_wait_s=1, row_s=0.01)
        waiting = [submitted(coalescer, accepted(1, rows=1000))]
        waiting += [submitted(coalescer, accepted(i)) for i in range(ALWAYS_WAIT - 1)]
        with pytest.raises(QueueFull) as refused:
            submitted(coalescer, accepted(9))
        assert refused.value.retry_after_s == 11
        await asyncio.gather(*waiting)

    asyncio.run(scenario())


@pytest.mark.parametrize("row_s", [0.0, 0.02 / 64])
def test_a_burst_on_a_model_that_was_asked_by_single_rows_is_let_in(row_s: float) -> None:
    """A single row takes as long as a full batch, and says nothing about a row of many."""
    runtime = FakeRuntime(run_s=0.02)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=64, inline_rows=0, max_wait_s=1, row_s=row_s)
        for _ in range(5):
            await submitted(coalescer, accepted(0))
        await asyncio.gather(*(submitted(coalescer, accepted(i)) for i in range(300)))

    asyncio.run(scenario())
    assert runtime.batches == [1] * 5 + [64] * 4 + [44]


def test_nobody_is_refused_for_a_rate_that_nobody_measured() -> None:
    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=1, inline_rows=64, max_wait_s=1e-9, max_waiting_rows=1000)
        assert coalescer.max_waiting_rows == 1000
        await asyncio.gather(*(submitted(coalescer, accepted(i)) for i in range(100)))

    asyncio.run(scenario())


def test_the_first_batch_of_many_tells_what_a_row_takes() -> None:
    """It is not averaged with a figure that nobody measured; a batch that is less than half full tells nothing."""
    runtime = FakeRuntime(run_s=0.02)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=4, inline_rows=0, max_wait_s=1, max_waiting_rows=1000)
        await submitted(coalescer, accepted(0))
        assert coalescer.max_waiting_rows == 1000
        await submitted(coalescer, accepted(0, rows=2))
        assert 32 <= coalescer.max_waiting_rows <= 100

    asyncio.run(scenario())


def test_what_passes_between_two_batches_is_waited_for_too() -> None:
    """Computing takes nothing and answering 10 ms: in a second a hundred are through, not thousands."""

    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=1, inline_rows=64, max_wait_s=1, row_s=0.01)
        for _ in range(20):
            coalescer.submit(accepted(1), lambda _: time.sleep(0.01))
        await submitted(coalescer, accepted(1))
        assert coalescer.max_waiting_rows <= 110

    asyncio.run(scenario())


def test_a_rate_that_was_thought_too_low_is_found_out_by_few() -> None:
    """A pause of the machine made a row seem to take ten seconds; single rows are enough to know better."""

    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=64, inline_rows=64, max_wait_s=1, row_s=10)
        assert coalescer.max_waiting_rows == ALWAYS_WAIT
        for i in range(100):
            await submitted(coalescer, accepted(i))
        assert coalescer.max_waiting_rows > 2 * ALWAYS_WAIT

    asyncio.run(scenario())


def test_a_larger_request_than_the_queue_holds_is_served_when_nobody_waits() -> None:
    async def scenario() -> None:
        coalescer = Coalescer(FakeRuntime(), max_rows=64, inline_rows=64, max_waiting_rows=2)
        assert (await submitted(coalescer, accepted(1, rows=9))).outputs[0].shape == (9, 3)

    asyncio.run(scenario())


def test_who_has_little_time_hears_at_once_that_it_is_over() -> None:
    """While the engine is busy, and though nobody looks; who has more time is still answered."""
    runtime = FakeRuntime(run_s=0.3)
    told_s: dict[float, float] = {}

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=1, inline_rows=0)
        start_ns = time.perf_counter_ns()

        def submit(rows: Accepted, timeout_s: float) -> None:
            def tell(computed: Computed) -> None:
                assert isinstance(computed.error, DeadlineExceeded)
                told_s[timeout_s] = (time.perf_counter_ns() - start_ns) / 1e9

            coalescer.submit(rows, tell, expires_ns=start_ns + int(timeout_s * 1e9))

        submit(accepted(1), 0.1)
        await asyncio.to_thread(runtime.started.wait)
        patient = submitted(coalescer, accepted(2), expires_ns=start_ns + 60_000_000_000)
        for timeout_s in (0.15, 0.05, 0.2):
            submit(accepted(3), timeout_s)
        await patient
        assert coalescer._alarm is None

    asyncio.run(scenario())
    assert sorted(told_s) == [0.05, 0.1, 0.15, 0.2]
    for timeout_s, heard_s in told_s.items():
        assert timeout_s <= heard_s < timeout_s + 0.04
    assert runtime.batches == [1, 1]


def test_for_who_has_time_enough_no_timer_is_set() -> None:
    """As for all who do not say how much they have."""

    async def scenario() -> None:
        runtime = FakeRuntime(run_s=0.05)
        coalescer = Coalescer(runtime, max_rows=1, inline_rows=0)
        plenty_ns = time.perf_counter_ns() + 30_000_000_000
        waiting = [
            submitted(coalescer, accepted(i), expires_ns=expires_ns) for i, expires_ns in [(1, plenty_ns), (2, None)]
        ]
        await asyncio.to_thread(runtime.started.wait)
        assert coalescer._alarm is None
        waiting.append(submitted(coalescer, accepted(3), expires_ns=time.perf_counter_ns() + 1_000_000_000))
        assert coalescer._alarm is not None
        await asyncio.gather(*waiting)
        assert coalescer._alarm is None

    asyncio.run(scenario())


def test_a_stuck_engine_keeps_nobody_waiting_beyond_the_deadline() -> None:
    """The one that runs and the one that waits are told; when the engine comes back, nobody is told twice."""
    runtime = FakeRuntime(run_s=0.1)
    told: list[Exception | None] = []

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=1, inline_rows=0)
        soon_ns = time.perf_counter_ns() + 20_000_000
        coalescer.submit(accepted(1), lambda computed: told.append(computed.error), expires_ns=soon_ns)
        coalescer.submit(accepted(2), lambda computed: told.append(computed.error), expires_ns=soon_ns)
        await asyncio.sleep(0.03)
        coalescer.drop_late()
        assert [type(error) for error in told] == [DeadlineExceeded, DeadlineExceeded]
        await asyncio.sleep(0.15)
        await submitted(coalescer, accepted(3))

    asyncio.run(scenario())
    assert len(told) == 2
    assert runtime.batches == [1, 1]


@pytest.mark.parametrize("inline", [True, False])
def test_a_large_request_runs_in_slices_and_others_go_in_between(inline: bool) -> None:
    """It gets the rows of all of them in their order; who came meanwhile does not wait for its end."""
    runtime = FakeRuntime(run_s=0.01)

    async def scenario() -> list[str]:
        coalescer = Coalescer(runtime, max_rows=4, slice_rows=4, inline_rows=4 if inline else 0)
        x = np.arange(66, dtype=np.float32).reshape(22, 3)
        order: list[str] = []
        large = submitted(coalescer, Accepted((x,), 22))
        large.add_done_callback(lambda _: order.append("large"))
        await asyncio.to_thread(runtime.started.wait)
        small = submitted(coalescer, accepted(1))
        small.add_done_callback(lambda _: order.append("small"))
        await small
        computed = await large
        assert computed.outputs[0].tobytes() == (2 * x).tobytes()
        assert computed.compute_ns > 0.05e9
        assert (coalescer.waiting_rows, coalescer._waiting_bytes, coalescer._busy) == (0, 0, False)
        return order

    assert asyncio.run(scenario()) == ["small", "large"]
    assert max(runtime.batches) == 4
    assert sum(runtime.batches) == 23


def test_a_large_request_that_nobody_wants_any_more_is_not_computed_to_its_end() -> None:
    """By time or because its client left; it hears that it had begun."""
    for left in (False, True):
        runtime = FakeRuntime(run_s=0.02)

        async def scenario(runtime: FakeRuntime = runtime, left: bool = left) -> None:
            coalescer = Coalescer(runtime, max_rows=1, slice_rows=1, inline_rows=0)
            soon_ns = None if left else time.perf_counter_ns() + 50_000_000
            gone = threading.Event()
            large = submitted(coalescer, accepted(1, rows=1000), expires_ns=soon_ns, gone=gone.is_set)
            await asyncio.sleep(0.05)
            gone.set() if left else None
            with pytest.raises(ClientLeft if left else DeadlineExceeded) as refused:
                await large
            assert left or "while it was computed; send fewer rows" in str(refused.value)
            await submitted(coalescer, accepted(2))

        asyncio.run(scenario())
        assert len(runtime.batches) < 10


def test_the_memory_of_a_large_request_counts_while_it_waits_for_its_next_slice() -> None:
    runtime = FakeRuntime(run_s=0.05)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=2, slice_rows=2, inline_rows=0, max_waiting_bytes=1000)
        first = submitted(coalescer, accepted(1))
        await asyncio.to_thread(runtime.started.wait)
        large = submitted(coalescer, accepted(2, rows=82))
        with pytest.raises(QueueFull, match="at most 1000 bytes may wait"):
            submitted(coalescer, accepted(3, rows=2))
        assert coalescer.waiting_rows == 2
        large.cancel()
        await first

    asyncio.run(scenario())


def test_a_run_that_nobody_waits_for_is_ended() -> None:
    """The engine is free again long before the run would have come to its end by itself."""
    runtime = FakeRuntime(run_s=60)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=2, inline_rows=0)
        soon_ns = time.perf_counter_ns() + 20_000_000
        late, patient = submitted(coalescer, accepted(1), expires_ns=soon_ns), submitted(coalescer, accepted(2))
        await asyncio.to_thread(runtime.started.wait)
        with pytest.raises(DeadlineExceeded, match="while it was computed"):
            await late
        coalescer.drop_late()
        await asyncio.sleep(0.05)
        assert coalescer._in_thread  # somebody still waits
        patient.cancel()
        runtime.run_s = 0
        coalescer.drop_late()
        await asyncio.wait_for(submitted(coalescer, accepted(3)), timeout=5)

    asyncio.run(scenario())
    assert runtime.batches == [2, 1]


def test_an_engine_that_does_not_end_when_it_is_told_to_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """For how long; not while somebody waits for the run, nor once it has come back."""
    monkeypatch.setattr(FakeRuntime, "stop", lambda self: None)
    runtime = FakeRuntime(run_s=60)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=1, inline_rows=0)
        waits = submitted(coalescer, accepted(1))
        await asyncio.to_thread(runtime.started.wait)
        coalescer.drop_late()
        assert coalescer.unwanted_s == 0
        waits.cancel()
        coalescer.drop_late()
        await asyncio.sleep(0.05)
        coalescer.drop_late()
        assert 0.05 <= coalescer.unwanted_s < 5
        runtime.run_s = 0
        runtime._stop.set()  # it comes back
        await asyncio.wait_for(submitted(coalescer, accepted(2)), timeout=5)
        assert coalescer.unwanted_s == 0

    asyncio.run(scenario())


def test_a_model_that_is_stuck_does_not_hold_up_another() -> None:
    """Nor what runs in the threads of the event loop: each model has a thread of its own."""
    stuck = [FakeRuntime(run_s=60) for _ in range(40)]

    async def scenario() -> None:
        coalescers = [Coalescer(runtime, max_rows=1, inline_rows=0) for runtime in stuck]
        asked = [submitted(coalescer, accepted(1)) for coalescer in coalescers]
        await asyncio.wait_for(asyncio.to_thread(lambda: [it.started.wait() for it in stuck]), timeout=10)
        quick = Coalescer(FakeRuntime(), max_rows=1, inline_rows=0)
        await asyncio.wait_for(submitted(quick, accepted(2)), timeout=10)
        for runtime in stuck:
            runtime.stop()
        await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(scenario())


def test_whoever_left_makes_room_though_no_time_is_ever_over() -> None:
    """Without deadlines, and while the engine is stuck."""
    runtime = FakeRuntime(run_s=60)

    async def scenario() -> None:
        coalescer = Coalescer(runtime, max_rows=1, inline_rows=0)
        runs, waits = submitted(coalescer, accepted(1)), submitted(coalescer, accepted(2))
        await asyncio.to_thread(runtime.started.wait)
        waits.cancel()
        coalescer.drop_late()
        assert coalescer.waiting_rows == 0
        runtime.stop()
        await asyncio.gather(runs, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("inline", [True, False])
def test_a_model_goes_on_after_a_count_that_breaks(inline: bool) -> None:
    """Who was in that batch is told, and the next is computed."""

    async def scenario() -> None:
        statistics = Statistics()
        coalescer = Coalescer(FakeRuntime(), max_rows=4, inline_rows=4 if inline else 0, statistics=statistics)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Statistics, "ran", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(submitted(coalescer, accepted(1)), timeout=5)
        await asyncio.wait_for(submitted(coalescer, accepted(2)), timeout=5)

    asyncio.run(scenario())


class Rejects(LosesRows):
    """Blames the rows, as an engine without its GPU does."""

    def __init__(self, rejected: Callable[[float], bool]) -> None:
        self._rejected = rejected

    def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        if self._rejected(float(tensors[0][0, 0])):
            raise RowsRejected("CUDA failure 700")
        return [tensors[0]]


@pytest.mark.parametrize(("rejected", "blamed"), [(lambda x: x == 3, RowsRejected), (lambda _: True, RuntimeError)])
def test_who_asks_is_not_blamed_for_a_broken_engine(rejected: Callable[[float], bool], blamed: type[Exception]) -> None:
    """One that cannot compute either what it was admitted with is ours, and logged."""

    async def scenario() -> None:
        coalescer = Coalescer(Rejects(rejected), max_rows=4, inline_rows=4, sample=accepted(1))
        with pytest.raises(blamed):
            await submitted(coalescer, accepted(3))

    asyncio.run(scenario())
