"""What /openapi.json says is what the service does: schemathesis makes requests of it and compares the answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Serve

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]

MODELS = Path(__file__).parents[2] / "models"

# Unload is left out: afterwards every route rightly answers 503.
# What fits the schema may still be refused: a number that 32 bits cannot hold, one that makes the network overflow, a
# shape that its data do not fill. JSON Schema has no words for these.
ASKED = ["--checks", "all", "--exclude-path-regex", "/unload$", "--exclude-checks", "positive_data_acceptance"]
REPEATABLE = ["--max-examples", "25", "--generation-deterministic", "--suppress-health-check", "all", "--no-color"]


def test_the_document_is_true(serve: Serve, tmp_path: Path) -> None:
    """Statuses, content types, bodies, methods that are not there, data that must be refused."""
    shutil.copytree(MODELS, tmp_path / "models")  # aliases are moved, and kept in it
    document = f"{serve(tmp_path / 'models').address}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", document, *ASKED, *REPEATABLE]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=150)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
