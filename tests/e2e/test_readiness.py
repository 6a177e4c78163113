"""Whether a service is ready is asked of its models, not of the process around them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve
from tests.e2e.stuck import NEVER, write_stuck_engine
from tests.e2e.test_workers import until

pytestmark = pytest.mark.e2e


def test_an_engine_that_is_stuck_is_not_ready(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives and says so; an orchestrator sends its requests elsewhere, and an alert can see it."""
    write_stuck_engine(tmp_path, monkeypatch)
    write_table_bundle(tmp_path / "models", name="table")
    serving = serve(tmp_path / "models", "--timeout-s", "0.2", "--shutdown-delay-s", "0")
    with httpx.Client(base_url=serving.address, timeout=20) as client:
        for path in ("/v2/health/ready", "/v2/models/table/ready"):
            assert client.get(path).status_code == 200
        assert client.post("/predict", json={**SAMPLE, "amount": NEVER}).status_code == 504
        until(lambda: client.get("/v2/health/ready").status_code == 503)
        said = client.get("/v2/models/table/ready")
        assert (said.status_code, said.json()["code"]) == (503, "not_ready")
        assert "has not answered a sample for" in said.json()["error"]
        assert client.get("/v2/health/live").status_code == 200
        assert "evalmode_ready 0.0" in client.get("/metrics").text
