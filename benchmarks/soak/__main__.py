"""Soaks, prints the table, writes the figures, and ends with 1 if anything was not as it should be."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.environment import environment
from benchmarks.soak.soak import soak

RESULT = Path(__file__).parent.parent / "results" / "soak.json"
MINUTES = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), minutes=asked.minutes, seed=asked.seed, workers=asked.workers)
    console.print(report.table())
    for fault in report.faults[:20]:
        console.print(fault, markup=False)
    said = json.dumps({**report.summary(), **environment()}, indent=1)
    print(said)
    if asked.minutes >= MINUTES:
        RESULT.write_text(said + "\n", encoding="utf-8")
        print(f"written: {RESULT}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
