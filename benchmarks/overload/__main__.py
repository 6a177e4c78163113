"""Runs both models, prints the table, and ends with 1 if a limit is missed."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.environment import environment
from benchmarks.overload.overload import MODELS, overload, table
from service.settings import Settings

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-queue-s", type=float, default=Settings.model_fields["max_queue_s"].default)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    reports = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            reports.append(
                overload(Path(folder), model, seconds=asked.seconds, max_queue_s=asked.max_queue_s, seed=asked.seed)
            )
    page = io.StringIO()
    for console in (Console(width=140), Console(width=140, file=page)):
        console.print(table(reports))
        for report in reports:
            for fault in report.faults:
                console.print(fault, markup=False)
    result = {
        "overload": [report.summary() for report in reports],
        "faults": [fault for report in reports for fault in report.faults],
        "max_queue_s": asked.max_queue_s,
        **environment(),
    }
    if asked.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "overload.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        known = ", ".join(f"{name} {result[name]}" for name in ("python", "onnxruntime", "uvicorn"))
        (RESULTS / "overload.md").write_text(
            "# Ten times the capacity\n\n"
            f"`python -m benchmarks.overload --write`, {asked.seconds:g} s of each load, `--max-queue-s "
            f"{asked.max_queue_s:g}`.\n\n```\n{page.getvalue()}```\n\n"
            f"{known}; {result['cpu']}; commit {result['commit']}.\n",
            encoding="utf-8",
        )
    print(json.dumps(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
