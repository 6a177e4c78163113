"""A disk that is full, and one that can only be read: what cannot be written is said, and what was there stays.

The disk is a small one in memory, in a mount namespace of its own; where the machine does not let us have that, these
tests are skipped.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx
import onnx
import pytest

from service.keys import made_key
from tests import graphs
from tests.bundles import SAMPLE, write_table_bundle

pytestmark = pytest.mark.e2e

FILLER = "filler"
DISKS = {
    "No space left on device": f'head -c 10000000 /dev/zero >"$1/{FILLER}" 2>/dev/null || true',
    "Read-only file system": 'mount -o remount,ro "$1"',
}
"""What is wrong with it, as the system says, and how it comes to be so."""

ON_A_DISK = """
set -e
mount -t tmpfs -o size=1m none "$1"
cp -r "$2/." "$1"
{}
shift 2
exec "$@"
"""


def on_a_disk(disk: str, files: Path, command: list[str]) -> list[str]:
    """`evalmode COMMAND` where the folder `disk` beside `files` is a disk with a copy of these files, in that state."""
    (files.parent / "disk").mkdir(exist_ok=True)
    script = ON_A_DISK.format(DISKS.get(disk, disk))
    before = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(files.parent / "disk"), str(files)]
    return [*before, sys.executable, "-m", "service.cli", *command]


@cache
def why_not() -> str:
    """Why this machine cannot have such a disk; empty where it can."""
    try:
        tried = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except OSError as error:
        return f"no namespaces here: {error}"
    return "" if tried.returncode == 0 else f"no disk of its own here: {tried.stderr.strip()}"


@pytest.fixture(autouse=True)
def _disks() -> None:
    if why_not():
        pytest.skip(why_not())


def in_the_end(disk: str, files: Path, command: list[str], shown: str) -> tuple[int, str, str, list[str]]:
    """Exit code and what was said; then a file's text, and the names beside it."""
    show = f'code=$?; cat "$0/{shown}"; ls -A "$0" >&2; exit $code'
    whole = on_a_disk(disk, files, command)
    at = whole.index(sys.executable)
    ended = subprocess.run(
        [*whole[:at], "sh", "-c", f'"$@" >"$0.said" 2>&1; {show}', str(files.parent / "disk"), *whole[at:]],
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    return ended.returncode, (files.parent / "disk.said").read_text(), ended.stdout, ended.stderr.split()


@pytest.mark.parametrize("disk", DISKS)
def test_a_key_that_cannot_be_kept_is_not_made(tmp_path: Path, disk: str) -> None:
    """The keys that were there are there still, and none is shown that opens nothing."""
    files, keys = tmp_path / "files", tmp_path / "disk" / "keys.txt"
    files.mkdir()
    before = made_key("shop", ["predict"])[1].line + "\n"
    (files / "keys.txt").write_text(before)
    code, said, kept, names = in_the_end(disk, files, ["key", "till", "--file", str(keys)], "keys.txt")
    refused = f"evalmode: the keys file '{keys}' cannot be written: {disk}; it is as it was, and no key was made\n"
    assert (code, said, kept) == (1, refused, before)
    assert {*names} <= {"keys.txt", FILLER}


@pytest.mark.parametrize("disk", DISKS)
def test_what_cannot_be_written_is_named(tmp_path: Path, disk: str) -> None:
    """By the name that was asked for, and nothing is left beside it."""
    files, out = tmp_path / "files", tmp_path / "disk" / "folded.onnx"
    files.mkdir()
    onnx.save(graphs.batchnorm_model(), files / "model.onnx")
    command = ["fold", str(files / "model.onnx"), str(out)]
    (files / "other").write_text("as it was")
    code, said, kept, names = in_the_end(disk, files, command, "other")
    assert (code, kept) == (1, "as it was")
    assert f"evalmode: {disk}: '{out}'" in said
    assert "Traceback" not in said
    assert {*names} <= {"model.onnx", "other", FILLER}


@contextmanager
def serving(disk: str, models: Path) -> Iterator[tuple[str, Path]]:
    """The address, and the served folder as the service sees it."""
    command = ["serve", str(models.parent / "disk"), "--port", "0", "--workers", "2", "--shutdown-delay-s", "0"]
    process = subprocess.Popen(
        on_a_disk(disk, models, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if "curl http" in line:
                break
        (address,) = re.findall(r"serving at +(http://\S+)", said)
        yield address, Path(f"/proc/{process.pid}/root{models.parent / 'disk'}")
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=20)
    assert "Traceback" not in rest
    assert (
        f"hold until the service ends: '{models.parent / 'disk' / 'table' / 'aliases.json'}' cannot be written" in rest
    )


@pytest.mark.parametrize("disk", DISKS)
def test_an_alias_that_cannot_be_kept_holds_and_says_so(tmp_path: Path, disk: str) -> None:
    """In all workers; the file is as it was, and gets everything as soon as there is room."""
    models = tmp_path / "models"
    write_table_bundle(models, name="table")
    (models / "table" / "aliases.json").write_text('{"stable": "1"}')
    with serving(disk, models) as (address, seen), httpx.Client(base_url=address, timeout=20) as client:
        aliases = "/v2/repository/models/table/aliases"
        moved = client.put(f"{aliases}/candidate", json={"version": "1"})
        assert (moved.status_code, moved.json()["survives_restart"]) == (200, False)
        gone = client.delete(f"{aliases}/stable")
        assert (gone.status_code, gone.json()["survives_restart"]) == (200, False)
        assert client.get(aliases).json() == {"aliases": {"candidate": "1"}}
        assert client.post("/predict", json=SAMPLE).status_code == 200
        assert (seen / "table" / "aliases.json").read_text() == '{"stable": "1"}'
        assert sorted(os.listdir(seen / "table")) == ["1", "aliases.json"]
        if (seen / FILLER).exists():
            (seen / FILLER).unlink()
            again = client.put(f"{aliases}/candidate", json={"version": "1"})
            assert again.json()["survives_restart"] is True
            assert (seen / "table" / "aliases.json").read_text() == '{\n  "candidate": "1"\n}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_that_cannot_say_anything_serves_all_the_same(tmp_path: Path, workers: str) -> None:
    """Its standard output goes to a full disk: the log says so, and everything else goes on."""
    write_table_bundle(tmp_path / "models")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", str(tmp_path / "models"), "--port", str(port)]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen([*command, "--workers", workers], stdout=full, stderr=subprocess.PIPE, text=True)
    try:
        limit_s = time.monotonic() + 30
        while not _answers(port):
            assert process.poll() is None
            assert time.monotonic() < limit_s
            time.sleep(0.1)
        assert httpx.post(f"http://127.0.0.1:{port}/predict", json=SAMPLE).status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        _, logged = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "nothing more is said on standard output: No space left on device" in logged


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200
    except httpx.ConnectError:
        return False
