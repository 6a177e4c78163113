"""A version is tried in a process of its own before a process that already serves loads it.

A hostile file, or a fault of the engine, can end the process that loads it, or keep it for ever. Whoever is served must
not notice that, so the first to load it is a process that nobody needs.

Rule 1: the trial is the same admission and rehearsal, on the same device, within bounds of time and memory.
Rule 2: a trial that does not come back is a refusal, with what ended it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from service.limits import GRACE_S
from service.runtime import Placement
from service.settings import Settings


def tried(path: Path, name: str, version: str, placement: Placement, settings: Settings) -> str:
    """Why this version cannot be served; empty if it can.

    Args:
        path: a bundle's folder, or a plain ONNX file.
    """
    facts = {
        "parent": os.getpid(),
        "path": str(path.absolute()),
        "name": name,
        "version": version,
        "placement": asdict(placement),
        "settings": settings.model_dump(mode="json"),
    }
    limit_s = settings.admission_limit_s + 2 * GRACE_S
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "service.try_version"],
            input=json.dumps(facts).encode(),
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not admitted: a process that tried it was not done after {limit_s:.0f} s"
    if ended.returncode < 0:
        return f"not admitted: it ended the process that tried it ({signal.Signals(-ended.returncode).name})"
    if ended.returncode:
        return f"not admitted: the process that tried it ended with code {ended.returncode}; the log says why"
    reason: str = json.loads(ended.stdout)
    return reason
