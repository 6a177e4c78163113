"""An engine that does not come back, for one value of a sample."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NEVER, SLOWLY = 666, 333
_STUCK = f"""
import time
from service import coalescing, http_server, runtime
from service.workers import worker

http_server.DRAIN_LIMIT_S = 2.0
worker.STUCK_S = 2.0
run, init = runtime.OnnxRuntime.run, coalescing.Coalescer.__init__

def stuck(self, tensors):
    for amount, run_s in (({NEVER}, 1000.0), ({SLOWLY}, 1.0)):
        if any((tensor == amount).any() for tensor in tensors):
            time.sleep(run_s)
    return run(self, tensors)

def in_threads(self, runtime, **said):
    init(self, runtime, **{{**said, "inline_rows": 0}})

runtime.OnnxRuntime.run = stuck
coalescing.Coalescer.__init__ = in_threads
"""


def write_stuck_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each process that is started from now on: where the amount is `NEVER` the engine never comes back, for
    `SLOWLY` it takes long; and neither the end nor that is waited for as long as it is.

    Args:
        folder: for what Python does at the start of each.
    """
    (folder / "sitecustomize.py").write_text(_STUCK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
