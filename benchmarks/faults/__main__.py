"""Ends and kills, prints the table, and ends with 1 if anything was not as it should be."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.faults.faults import COMING, STAYING, End, Kill, ended, kill
from service.bundle import PASSPORT_FILE, Passport

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
RESULTS = ROOT / "benchmarks" / "results"
BAR_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ends", type=int, default=20, help="by SIGTERM, with one worker and with two each")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="faults.json and faults.md in benchmarks/results")
    asked = parser.parse_args()
    passport = Passport.model_validate_json((MODELS / "credit" / "1" / PASSPORT_FILE).read_bytes())
    sample = passport.signature.example()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        ends = [ended(MODELS, sample, log, workers=workers) for workers in (1, 2) for _ in range(asked.ends)]
        kills = [kill(MODELS, sample, log) for _ in range(asked.kills)]
    faults = [*(fault for end in ends for fault in end.faults), *(fault for one in kills for fault in one.faults)]
    rows = [*_rows(ends), *_of_kills(kills)]
    Console(width=120).print(_table(rows))
    for fault in faults[:20]:
        print(fault)
    late = sum(one.seconds > BAR_S for one in kills)
    said = {"faults": len(faults), "late": late, "rows": rows, **environment()}
    if asked.write:
        whole = {**said, "ends": [*map(asdict, ends)], "kills": [*map(asdict, kills)]}
        (RESULTS / "faults.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "faults.md").write_text(_page(rows, said), encoding="utf-8")
    print(json.dumps(said))
    return 1 if faults or late else 0


def _rows(ends: Sequence[End]) -> list[tuple[str, str]]:
    rows = []
    for workers in sorted({end.workers for end in ends}):
        those = [end for end in ends if end.workers == workers]
        what = f"SIGTERM, {workers} worker{'s' if workers > 1 else ''}"
        rows += [
            (f"{what}: ends without a loss, exit code 0", f"{sum(not end.faults for end in those)} of {len(those)}"),
            (
                f"{what}: requests answered / lost",
                f"{_sum(those, 'answered'):,} / {sum(len(end.lost) for end in those)}",
            ),
            (f"{what}: seconds until it is gone", _spread(those)),
        ]
    return rows


def _of_kills(kills: Sequence[Kill]) -> list[tuple[str, str]]:
    if not kills:
        return []
    what = "SIGKILL of 1 of 2 workers"
    return [
        (f"{what}: connections it held / requests failed", f"{_sum(kills, 'held')} / {_sum(kills, 'failed')}"),
        (
            f"{what}: failed elsewhere / refused",
            f"{sum(len(one.elsewhere) for one in kills)} / {_sum(kills, 'refused')}",
        ),
        (f"{what}: requests answered meanwhile", f"{_sum(kills, 'answered'):,}"),
        (f"{what}: seconds until both serve again", f"{_spread(kills)} (bar {BAR_S:g})"),
    ]


def _sum(those: Sequence[End] | Sequence[Kill], name: str) -> int:
    return sum(getattr(one, name) for one in those)


def _spread(those: Sequence[End] | Sequence[Kill]) -> str:
    seconds = sorted(one.seconds for one in those)
    return f"{statistics.median(seconds):.2f}, {seconds[0]:.2f} to {seconds[-1]:.2f}"


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table("what", "how much", title="What is lost when processes end", caption=_callers())
    for row in rows:
        table.add_row(*row)
    return table


def _callers() -> str:
    return f"{STAYING} callers that stay on their connection and {COMING} that do not, each with a request in flight"


def _page(rows: Sequence[tuple[str, str]], said: dict[str, Any]) -> str:
    known = ", ".join(f"{name} {said[name]}" for name in ("python", "onnxruntime", "uvicorn"))
    lines = ["# What is lost when processes end", "", f"`python -m benchmarks.faults --write`: {_callers()}.", ""]
    lines += ["| what | how much |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows), ""]
    return "\n".join([*lines, f"{known}; {said['cpus']} CPUs, {said['cpu']}; commit {said['commit']}.", ""])


if __name__ == "__main__":
    sys.exit(main())
