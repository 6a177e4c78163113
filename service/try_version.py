"""The process that tries a version: what to try on standard input, `Tried` on standard output."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from service.places import Found
from service.repository import load_bounded
from service.runtime import Placement
from service.settings import Settings
from service.trial import Tried

if __name__ == "__main__":
    facts = json.load(sys.stdin)
    found = Found(name=facts["name"], version=facts["version"], path=Path(facts["path"]))
    entry = load_bounded(found, Placement(**facts["placement"]), Settings(**facts["settings"]))
    digests = {} if entry.live is None else entry.live.admitted.bundle.digests
    json.dump(asdict(Tried(reason=entry.reason, digests=digests)), sys.stdout)
