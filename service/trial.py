"""A version is tried in a process of its own before a process that already serves loads it.

A hostile file, or a fault of the engine, can end the process that loads it, or keep it for ever. Whoever is served must
not notice that, so the first to load it is a process that nobody needs.

Rule 1: the trial is the same admission and rehearsal, on the same device, within bounds of time and memory.
Rule 2: a trial that does not come back is a refusal, with what ended it.
Rule 3: a trial is of bytes, not of a path: it says the digest of every file that it read, and nothing else is loaded.
Rule 4: nobody waits for a trial when the service ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import final

from service.bundle import Digests
from service.errors import STOPPING, NotReady
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


@final
class Trials:
    """Those of one service."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def end(self) -> None:
        """Nothing is tried any more, and what is being tried is given up at once; from any thread."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()

    def tried(self, path: Path, name: str, version: str, placement: Placement, settings: Settings) -> Tried:
        """Try a version in another process.

        Args:
            path: a bundle's folder, or a plain ONNX file.

        Raises:
            NotReady: the service ends, so it was not tried to the end.
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
        with self._begun() as process:
            try:
                said, _ = process.communicate(json.dumps(facts).encode(), timeout=limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                return Tried(reason=f"not admitted: a process that tried it was not done after {limit_s:.0f} s")
        if self._ended:
            raise NotReady(STOPPING)
        code = process.returncode
        if code < 0:
            return Tried(reason=f"not admitted: it ended the process that tried it ({signal.Signals(-code).name})")
        if code:
            return Tried(reason=f"not admitted: the process that tried it ended with code {code}; the log says why")
        return Tried(**json.loads(said))

    @contextmanager
    def _begun(self) -> Iterator[subprocess.Popen[bytes]]:
        with self._lock:
            if self._ended:
                raise NotReady(STOPPING)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service.try_version"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            self._running.add(process)
        try:
            with process:
                yield process
        finally:
            with self._lock:
                self._running.discard(process)
