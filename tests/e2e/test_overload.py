"""Ten times as many requests as can be answered: `benchmarks.overload`, a short one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.overload.overload import Model, overload

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not Path("/proc").exists(), reason="reads processes from /proc"),
]

MAX_QUEUE_S = 0.5


@pytest.mark.parametrize("max_batch_rows", [1, 64])
def test_those_who_are_answered_feel_little_of_those_who_are_too_many(tmp_path: Path, max_batch_rows: int) -> None:
    """Who is let in is answered rightly and waits no longer than it may; all others are told when to come again; then
    the next is answered at once."""
    model = Model(title="slow", layers=60, max_batch_rows=max_batch_rows)
    report = overload(tmp_path, model, seconds=3, max_queue_s=MAX_QUEUE_S)
    for load in (report.at_capacity, report.overload):
        assert set(load.answers.statuses) <= {"200", "429"}
        assert load.answers.wrong == 0
        assert min(load.answers.retry_after_s, default=1) >= 1
    answers = report.overload.answers
    assert answers.statuses["429"] > answers.statuses["200"] > 0
    # as told by the server; without the bound, for ten times as long. A machine that is at work for others too may give
    # the server less time than before
    slowed = max(1.0, report.capacity_per_s / answers.accepted_per_s)
    assert max(answers.queue_s) < 4 * MAX_QUEUE_S * slowed
    assert report.overload.growth_mb < 32
    assert report.afterwards.statuses == {"200": 1}
    assert max(report.afterwards.queue_s) < MAX_QUEUE_S / 2
