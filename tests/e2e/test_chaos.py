"""Callers of every kind at once, half of them harmful: `benchmarks.chaos`, a short one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos.chaos import chaos

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not Path("/proc").exists(), reason="reads processes from /proc")]


@pytest.mark.parametrize("workers", [1, 2])
def test_nobody_is_harmed_by_what_others_send(tmp_path: Path, workers: int) -> None:
    """No 5xx, each good answer bit by bit the model's own, and nothing is left of anybody afterwards."""
    report = chaos(tmp_path, requests=2000, connections=50, seed=7, workers=workers)
    assert report.faults == []
