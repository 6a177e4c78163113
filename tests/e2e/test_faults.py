"""Workers that are killed again and again while the service is asked, as `benchmarks.faults` does it once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.chaos.server import serving
from benchmarks.faults.clients import calling
from benchmarks.faults.faults import COMING, LOADED_S, STAYING, killed
from tests.bundles import SAMPLE, write_table_bundle

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not Path("/proc").exists(), reason="reads connections of processes from /proc"),
]

RECOVERED_S = 10.0
"""Generous, for machines that have other work; `python -m benchmarks.faults` holds the figure against its bar."""


def test_a_kill_costs_what_was_in_flight_there_and_nothing_else(tmp_path: Path) -> None:
    """Each of the two workers in turn, four times: nobody is refused, nobody else loses anything, both serve again."""
    write_table_bundle(tmp_path / "models")
    with (
        serving(tmp_path / "models", workers=2, log=tmp_path / "log") as server,
        calling(server.port, SAMPLE, staying=STAYING, coming=COMING) as clients,
    ):
        for _ in range(4):
            time.sleep(LOADED_S)
            kill = killed(server, clients)
            print(kill)
            assert kill.faults == []
            assert kill.answered > 100
            assert kill.seconds < RECOVERED_S
