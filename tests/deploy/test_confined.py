"""The service as containers run it: as process 1, where nothing can be written, with little memory.

No container engine is needed: namespaces of Linux give it a process tree of its own, and a view of the file system in
which every mount is read-only, `/tmp` too. Where the machine does not let us have them, these tests are skipped.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import pytest

from tests.bundles import SAMPLE, write_table_bundle
from tests.deploy.manifests import CONTAINERS, ROOT, settings_env, size_bytes

pytestmark = pytest.mark.e2e

NAMESPACES = ["unshare", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
READ_ONLY = r"""
set -e
while read -r _ where kind _; do
  case $kind in proc | sysfs | cgroup* | devpts | mqueue | autofs) continue ;; esac
  mount -o remount,bind,ro "$(printf %b "$where")"
done </proc/self/mounts
if touch /tmp/written || touch "$1/written"; then exit 9; fi 2>/dev/null
shift
exec "$@"
"""


@cache
def why_not() -> str:
    """Why this machine cannot confine a process; empty where it can."""
    try:
        tried = subprocess.run(
            [*NAMESPACES, "sh", "-c", READ_ONLY, "sh", str(ROOT), "true"], capture_output=True, text=True, timeout=10
        )
    except OSError as error:
        return f"no namespaces here: {error}"
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip() or tried.returncode}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Confined:
    """A service that is process 1 of its own tree."""

    process: subprocess.Popen[str]

    def pid(self) -> int:
        """Process 1, as it is called out here."""
        (first,) = children(self.process.pid)
        return first

    def said_until(self, words: str) -> str:
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if words in line:
                break
        assert words in said, said
        return said

    def address(self) -> str:
        said = self.said_until("curl http")
        (address,) = re.findall(r"serving at +(http://\S+)", said)
        return str(address)

    def end(self) -> int:
        os.kill(self.pid(), signal.SIGTERM)
        return self.process.wait(timeout=10)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    """`R`, `S`, ...; `Z` is one that has ended and that nobody has asked after."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def resident_bytes(pid: int) -> int:
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) * 1024


def until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to be")


Confine = Callable[..., Confined]


@pytest.fixture
def confine() -> Iterator[Confine]:
    """`evalmode serve PATH --port 0 [flags]`, confined."""
    if why_not():
        pytest.skip(why_not())
    running: list[subprocess.Popen[str]] = []

    def start(path: Path, *flags: str) -> Confined:
        serve = [sys.executable, "-m", "service.cli", "serve", str(path), "--port", "0", *flags]
        process = subprocess.Popen(
            [*NAMESPACES, "sh", "-c", READ_ONLY, "sh", str(ROOT), *serve],
            cwd=ROOT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "EVALMODE_SHUTDOWN_DELAY_S": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return Confined(process=process)

    def kill() -> None:
        for process in running:
            process.kill()

    limit = threading.Timer(45, kill)  # whoever waits for a line then sees the end of its output
    limit.start()
    yield start
    limit.cancel()
    kill()
    for process in running:
        process.wait(timeout=10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_it_serves_where_nothing_can_be_written(confine: Confine, tmp_path: Path, workers: int) -> None:
    """Under the name that KServe gives it, it predicts, shows its page, and ends with 0; nothing is left behind."""
    write_table_bundle(tmp_path, name="table")
    confined = confine(tmp_path, "--workers", str(workers), "--name=judge")
    address = confined.address()
    assert httpx.post(f"{address}/models/judge/predict", json=SAMPLE).json()["model"] == "judge"
    large = httpx.post(f"{address}/predict", content=b" " * 5_000_000 + b"{}")
    assert large.status_code == 400
    assert httpx.get(f"{address}/docs").status_code == 200
    assert confined.end() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table"]


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_ends_process_1_while_models_load(confine: Confine, workers: int) -> None:
    """The kernel drops a signal that process 1 has no handler for; the platform would wait its whole patience."""
    confined = confine(ROOT / "models", "--workers", str(workers))
    confined.said_until("models run on")
    assert confined.end() == 0
    assert confined.process.stdout is not None
    assert "Traceback" not in confined.process.stdout.read()


def test_process_1_asks_after_its_workers(confine: Confine, tmp_path: Path) -> None:
    """One that was killed is replaced, and nothing is left of it."""
    write_table_bundle(tmp_path, name="table")
    confined = confine(tmp_path, "--workers", "2")
    confined.address()
    first = confined.pid()
    killed = children(first)[0]
    os.kill(killed, signal.SIGKILL)
    until(lambda: killed not in children(first) and len(children(first)) == 3)  # two that serve, and the spare
    assert all(state(child) != "Z" for child in children(first))
    assert confined.end() == 0


def test_the_shipped_model_fits_into_what_is_requested(confine: Confine) -> None:
    """Memory of all processes after the start, with as many workers as the manifest has."""
    workers = settings_env()["EVALMODE_WORKERS"]
    confined = confine(ROOT / "models", "--workers", workers)
    confined.address()
    first = confined.pid()
    used = sum(resident_bytes(pid) for pid in (first, *children(first)))
    for container in CONTAINERS.values():
        assert used < size_bytes(container["resources"]["requests"]["memory"])
