"""The process that tries a version: what to try on standard input, `Tried` on standard output.

Rule 1: nothing else comes on standard output: what the engine prints there goes to the log.
Rule 2: it ends with the process that asked, where the system can say so (Linux).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from service.places import Found
from service.repository import load_bounded
from service.runtime import Placement
from service.settings import Settings
from service.trial import Tried

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """From now on this process does not outlive its parent."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            sys.exit("the process that asked for this trial has ended")


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    facts = json.load(sys.stdin)
    end_with(facts["parent"])
    found = Found(name=facts["name"], version=facts["version"], path=Path(facts["path"]))
    entry = load_bounded(found, Placement(**facts["placement"]), Settings(**facts["settings"]))
    digests = {} if entry.live is None else entry.live.admitted.bundle.digests
    with answer:
        json.dump(asdict(Tried(reason=entry.reason, digests=digests)), answer)
