"""What a soak makes of what it saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.chaos.chaos import POOL_THREADS
from benchmarks.chaos.client import Cause, Failure
from benchmarks.chaos.server import Held, Holding
from benchmarks.soak.disturbances import Sample
from benchmarks.soak.soak import KILL_S, Report, grown, slope

SUPERVISOR, KILLED, WORKER, LATER, SPARE, TRIAL = range(1, 7)


def holding(pid: int, *, own_mb: float = 90.0, descriptors: int = 15, threads: int = 4) -> Holding:
    return Holding(
        pid=pid, descriptors=descriptors, threads=threads, connections=0, memory_mb=own_mb + 20, own_mb=own_mb
    )


def sample(at_s: float, requests: int, *each: Holding) -> Sample:
    return Sample(at_s, requests, Held(each))


def report(*, failures: Sequence[Failure] = (), samples: Sequence[Sample] = (), workers: int = 1) -> Report:
    return Report(
        minutes=1,
        statuses=Counter({"200": 9}),
        turned=Counter({"200": 1}),
        burst=Counter(),
        failures=failures,
        killed_s=[100.0],
        grown=grown(samples, since_s=10.0, workers=workers) if samples else [],
    )


@pytest.mark.parametrize(
    ("failure", "explained"),
    [
        (Failure(Cause.SILENCE, "closed", at_s=100.5), True),
        (Failure(Cause.SILENCE, "closed before any was killed", at_s=99.9), False),
        (Failure(Cause.SILENCE, "closed long after", at_s=100.1 + KILL_S), False),
        (Failure(Cause.WRONG, "it differs", at_s=100.5), False),
        (Failure(Cause.STATUS, "answered 500", at_s=100.5), False),
    ],
    ids=lambda value: value.said if isinstance(value, Failure) else "",
)
def test_a_kill_explains_that_there_was_no_answer_and_nothing_else(failure: Failure, explained: bool) -> None:
    one = report(failures=[failure])
    assert [said.said for said in one.cut] == [failure.said] * explained
    assert one.faults == [failure.said] * (not explained)


def test_processes_that_stay_are_followed_each_for_itself() -> None:
    """Not the one that was killed, nor one that came and went; whoever took a place is held against the one before."""
    supervisor, spare = holding(SUPERVISOR, own_mb=40, descriptors=9), holding(SPARE, own_mb=54, threads=2)
    one = report(
        samples=[
            sample(0, 0, supervisor, spare, holding(KILLED), holding(WORKER)),
            sample(10, 1000, supervisor, holding(WORKER), holding(LATER), holding(TRIAL), spare),
            sample(20, 2000, supervisor, holding(WORKER, own_mb=91), holding(LATER), spare),
            sample(30, 3000, supervisor, spare, holding(WORKER, own_mb=92), holding(LATER)),
        ],
        workers=2,
    )
    assert [(each.role, each.end.pid, each.begun.pid, each.requests) for each in one.grown] == [
        ("supervisor", SUPERVISOR, SUPERVISOR, 2000),
        ("worker", WORKER, KILLED, 2000),
        ("worker", LATER, KILLED, 2000),
        ("spare", SPARE, SPARE, 2000),
    ]
    assert [each.slope_mb for each in one.grown] == pytest.approx([0, 100, 0, 0], abs=1e-6)
    assert one.faults == []


@pytest.mark.parametrize(
    ("last", "requests", "fault"),
    [
        (holding(WORKER, own_mb=92), 300_000, None),
        (holding(WORKER, own_mb=94), 300_000, "grew by 1.33 MB"),
        (holding(WORKER, own_mb=120), 3000, None),
        (holding(WORKER, own_mb=130), 3000, "grew by 40.00 MB"),
        (holding(WORKER, descriptors=16), 3000, "has 16 descriptors, 15 at the start"),
        (holding(WORKER, threads=4 + POOL_THREADS), 3000, None),
        (holding(WORKER, threads=99), 3000, "has 99 threads, 4 at the start"),
    ],
)
def test_what_a_process_may_not_do(last: Holding, requests: int, fault: str | None) -> None:
    samples = [sample(0, 0, holding(WORKER)), sample(10, 0, holding(WORKER)), sample(20, requests, last)]
    found = report(samples=samples).faults
    assert [fault in said for said in found] == [True] if fault else found == []


@pytest.mark.parametrize(("slope_mb", "share"), [(0.5, 0), (10, 1)])
def test_chance_is_no_fault_and_a_leak_is(slope_mb: float, share: float) -> None:
    """In five minutes: 100 samples of 120,000 requests, up and down by 3 MB as they are."""
    noise, runs = np.random.default_rng(7), 500
    at_s, asked = np.linspace(10, 110, 100), np.linspace(0, 120_000, 100).astype(int)
    found = 0
    for _ in range(runs):
        held_mb = 140 + slope_mb * asked / 100_000 + noise.normal(0, 3, 100)
        samples = [
            sample(*at, holding(WORKER, own_mb=mb)) for *at, mb in zip(at_s, asked.tolist(), held_mb, strict=True)
        ]
        found += bool(report(samples=[samples[0], *samples]).faults)
    assert found == share * runs


def test_a_slope_is_as_certain_as_the_points_are_close_to_it() -> None:
    """The textbook's formula, with numbers that were computed by hand."""
    assert slope([0, 1, 2, 3], [1, 3, 2, 4]) == pytest.approx((0.8, 0.4242640687))
    assert slope([0, 2], [1, 5]) == pytest.approx((2, 0))
