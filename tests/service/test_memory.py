"""Memory that is free is not scattered over an arena for each thread."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve

HEAP_BYTES = 64 * 2**20
"""What glibc reserves at once for an arena that is not the first, and a multiple of which it begins at: `HEAP_MAX_SIZE`
in malloc/arena.c."""

MANY_THREADS = """
import os, threading
from service.memory import share_arenas
share_arenas()
there = threading.Barrier(12)
def hold():
    there.wait()
    kept = [os.urandom(5000) for _ in range(1000)]
    there.wait()
    del kept
threads = [threading.Thread(target=hold) for _ in range(11)]
for thread in threads:
    thread.start()
there.wait()
print(open("/proc/self/maps").read())
there.wait()
"""


def arenas(maps: str) -> int:
    """That are in use beside the first.

    Args:
        maps: as in proc_pid_maps(5).
    """
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *\n\2-([0-9a-f]+) ---p", maps, re.MULTILINE)
    return sum(
        int(start, 16) % HEAP_BYTES == 0 and int(end, 16) - int(start, 16) == HEAP_BYTES for start, _, end in found
    )


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's arenas")


@linux
@pytest.mark.parametrize(
    ("said", "most"),
    [({}, 1), ({"MALLOC_ARENA_MAX": "4"}, 3), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, 3)],
    ids=["usual", "by the operator", "by a tunable"],
)
def test_threads_share_two(said: dict[str, str], most: int) -> None:
    """Unless the operator has said how many there are to be."""
    command = [sys.executable, "-c", MANY_THREADS]
    maps = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **said}).stdout
    assert arenas(maps) == most


@linux
@pytest.mark.e2e
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_has_two(serve: Serve, tmp_path: Path, workers: str) -> None:
    write_table_bundle(tmp_path)
    serving = serve(tmp_path, "--workers", workers)
    for _ in range(20):
        assert httpx.post(f"{serving.address}/predict", json=SAMPLE).status_code == 200
    pid = serving.process.pid
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if workers == "2" else [str(pid)]
    for each in below:
        assert arenas(Path(f"/proc/{each}/maps").read_text()) <= 1
