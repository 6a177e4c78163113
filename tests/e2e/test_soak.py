"""A minute of everything at once: broken requests, new versions, a killed worker, bursts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak.soak import soak

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]


def test_nothing_is_wrong_and_nothing_is_lost(tmp_path: Path) -> None:
    report = soak(tmp_path, minutes=1, seed=2)
    assert report.kills
    assert report.turned["200"] > 100
    assert (report.wrong, report.lost) == ([], [])
