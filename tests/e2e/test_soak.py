"""Five minutes of everything at once: broken requests, new versions, killed workers, bursts."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.soak.soak import soak

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

MINUTES = 5


def test_nothing_is_wrong_and_nothing_is_lost(tmp_path: Path) -> None:
    """And no process, of those that stay, holds more and more."""
    report = soak(tmp_path, minutes=MINUTES, seed=2)
    Console(width=160).print(report.table())
    assert len(report.killed_s) > 5
    assert report.turned["200"] > 100
    assert report.burst["200"] > 100
    assert report.burst["429"] > 100
    assert report.faults == []
    assert [one.role for one in report.grown] == ["supervisor", "worker", "worker", "spare"]
