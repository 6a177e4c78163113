"""What /openapi.json says is what the service does: schemathesis makes requests of it and compares the answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.keys import made_key
from tests.conftest import Serve

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]

MODELS = Path(__file__).parents[2] / "models"

# Unload is left out: afterwards every route rightly answers 503.
# What fits the schema may still be refused: a number that 32 bits cannot hold, one that makes the network overflow, a
# shape that its data do not fill. JSON Schema has no words for these.
ASKED = ["--checks", "all", "--exclude-path-regex", "/unload$", "--exclude-checks", "positive_data_acceptance"]
REPEATABLE = ["--max-examples", "25", "--generation-deterministic", "--suppress-health-check", "all", "--no-color"]


@pytest.mark.parametrize("keys", [False, True], ids=["open", "with keys"])
def test_the_document_is_true(serve: Serve, tmp_path: Path, keys: bool) -> None:
    """Statuses, content types, bodies, methods that are not there, data that must be refused; and, where keys are asked
    for, that nothing that asks for one is given without it or with a wrong one."""
    shutil.copytree(MODELS, tmp_path / "models")  # aliases are moved, and kept in it
    flags, header = [], []
    if keys:
        secret, key = made_key("all", ["predict", "manage", "metrics"])
        (tmp_path / "keys.txt").write_text(key.line + "\n", encoding="utf-8")
        flags, header = ["--keys-file", str(tmp_path / "keys.txt")], ["--header", f"Authorization: Bearer {secret}"]
    document = f"{serve(tmp_path / 'models', *flags).address}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", document, *header, *ASKED, *REPEATABLE]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=150)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
