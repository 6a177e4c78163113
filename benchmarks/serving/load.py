"""The load generator: wrk, with one thread, several bodies in turn, and its counts as JSON.

wrk keeps each connection busy: it sends the next request when the answer has come. Its percentiles correct for a
server that stood still, which it does by itself.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.wire import Request

SCRIPT = Path(__file__).with_name("load.lua")
TIMEOUT_S = 10
WARM_UP_S = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What wrk counted."""

    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    non_2xx: int
    socket_errors: int
    cpu_s: float
    """That wrk itself used."""


class WrkFailed(Exception):
    """wrk is not installed, or did not say what it counted."""


def write_bodies(folder: Path, requests: Sequence[Request]) -> None:
    """What `load.lua` reads. All requests have the same headers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "headers").write_text("".join(f"{name}: {value}\n" for name, value in requests[0].headers.items()))
    for i, request in enumerate(requests):
        (folder / str(i)).write_bytes(request.body)


def driven(url: str, bodies: Path, *, connections: int, seconds: int) -> Load:
    """What this many connections get in this time.

    Raises:
        WrkFailed: wrk ended without a count.
    """
    count = sum(1 for _ in bodies.iterdir()) - 1
    command = [
        "wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s",
        "--timeout", f"{TIMEOUT_S}s", "--script", str(SCRIPT), url, "--", str(bodies), str(count),
    ]  # fmt: skip
    before_s = _children_cpu_s()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 60)
    except FileNotFoundError as missing:
        raise WrkFailed("wrk is not installed; Debian and Ubuntu have it: apt-get install wrk") from missing
    except subprocess.TimeoutExpired as hung:
        raise WrkFailed("wrk did not end") from hung
    if ended.returncode:
        raise WrkFailed(f"wrk: {(ended.stderr or ended.stdout).strip()}")
    return parsed(ended.stdout, cpu_s=_children_cpu_s() - before_s)


def parsed(printed: str, *, cpu_s: float) -> Load:
    """The counts in what wrk printed: the last line that is JSON.

    Raises:
        WrkFailed: there is none.
    """
    line = next((line for line in reversed(printed.splitlines()) if line.startswith("{")), None)
    if line is None:
        raise WrkFailed(f"wrk did not say what it counted: {printed.strip()[-200:]}")
    counted = json.loads(line)
    return Load(
        requests=counted["requests"],
        requests_per_s=counted["requests"] / (counted["duration_us"] / 1e6),
        p50_ms=counted["p50_us"] / 1e3,
        p99_ms=counted["p99_us"] / 1e3,
        p999_ms=counted["p999_us"] / 1e3,
        non_2xx=counted["non_2xx"],
        socket_errors=counted["socket_errors"],
        cpu_s=cpu_s,
    )


def _children_cpu_s() -> float:
    """Of the processes that were waited for; a server still runs, so wrk is all that ends in between."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
