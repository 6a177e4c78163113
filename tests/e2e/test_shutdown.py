"""SIGTERM under load: not ready first, then everything that was accepted is answered, then exit 0."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.faults.faults import ended
from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("turn", range(2))
def test_nothing_that_was_accepted_is_lost(tmp_path: Path, workers: int, turn: int) -> None:
    write_table_bundle(tmp_path / "models")
    end = ended(tmp_path / "models", SAMPLE, tmp_path / "log", workers=workers)
    assert end.faults == []
    assert end.answered > 100


def test_it_is_not_ready_first(serve: Serve, tmp_path: Path) -> None:
    """For as long as was said, it refuses to be ready, answers, and asks each connection to end."""
    write_table_bundle(tmp_path)
    serving = serve(tmp_path, "--shutdown-delay-s", "3")
    with httpx.Client(base_url=serving.address, timeout=5) as client:
        assert client.post("/predict", json=SAMPLE).headers.get("connection") is None
        serving.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        ready = client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["error"]) == (503, "the service is being stopped")
        (model,) = client.post("/v2/repository/index").json()
        assert client.get(f"/v2/models/{model['name']}/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        answer = client.post("/predict", json=SAMPLE)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    start = time.monotonic()
    serving.process.send_signal(signal.SIGTERM)  # who says it twice does not want to wait
    assert serving.process.wait(timeout=20) == 0
    assert time.monotonic() - start < 1.5


def test_ctrl_c_does_not_wait(serve: Serve, tmp_path: Path) -> None:
    write_table_bundle(tmp_path)
    serving = serve(tmp_path, "--shutdown-delay-s", "30")
    start = time.monotonic()
    assert serving.stop() == 0
    assert time.monotonic() - start < 5
