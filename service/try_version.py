"""The process that tries a version: what to try on standard input, why it cannot be served on standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from service.places import Found
from service.repository import load_bounded
from service.runtime import Placement
from service.settings import Settings

if __name__ == "__main__":
    facts = json.load(sys.stdin)
    found = Found(name=facts["name"], version=facts["version"], path=Path(facts["path"]))
    entry = load_bounded(found, Placement(**facts["placement"]), Settings(**facts["settings"]))
    json.dump(entry.reason, sys.stdout)
