"""Runs the chaos, prints its table, writes its figures, and ends with 1 if anything was not as it should be."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.chaos.chaos import chaos
from benchmarks.environment import environment

RESULT = Path(__file__).parent.parent / "results" / "chaos.json"
REQUESTS = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    asked = parser.parse_args()
    console = Console(width=120)
    reports = []
    for workers in asked.workers:
        with tempfile.TemporaryDirectory() as folder:
            report = chaos(
                Path(folder),
                requests=asked.requests,
                connections=asked.connections,
                seed=asked.seed,
                workers=workers,
            )
        console.print(report.table())
        for fault in report.faults[:20]:
            console.print(fault, markup=False)
        reports.append(report)
    said = json.dumps({"chaos": [report.summary() for report in reports], **environment()}, indent=1)
    print(said)
    if asked.requests >= REQUESTS:
        RESULT.write_text(said + "\n", encoding="utf-8")
        print(f"written: {RESULT}")
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
