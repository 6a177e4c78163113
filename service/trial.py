"""A version is tried in a process of its own before a process that already serves loads it.

A hostile file, or a fault of the engine, can end the process that loads it, or keep it for ever. Whoever is served must
not notice that, so the first to load it is a process that nobody needs.

Rule 1: the trial is the same admission and rehearsal, on the same device, within bounds of time and memory.
Rule 2: a trial that does not come back is a refusal, with what ended it.
Rule 3: a trial is of bytes, not of a path: it says the digest of every file that it read, and nothing else is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import final

from service.bundle import Digests
from service.limits import GRACE_S
from service.runtime import Placement
from service.settings import Settings


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What became of a version that was tried."""

    reason: str = ""
    """Why it cannot be served; empty if it can."""
    digests: Digests = field(default_factory=dict)
    """Of what was read."""


def tried(path: Path, name: str, version: str, placement: Placement, settings: Settings) -> Tried:
    """Try a version in another process.

    Args:
        path: a bundle's folder, or a plain ONNX file.
    """
    facts = {
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
        return Tried(reason=f"not admitted: a process that tried it was not done after {limit_s:.0f} s")
    if ended.returncode < 0:
        name_of_end = signal.Signals(-ended.returncode).name
        return Tried(reason=f"not admitted: it ended the process that tried it ({name_of_end})")
    if ended.returncode:
        code = ended.returncode
        return Tried(reason=f"not admitted: the process that tried it ended with code {code}; the log says why")
    return Tried(**json.loads(ended.stdout))
