"""A container's limits: one CPU and some memory, given by the kernel as a container's engine asks for them.

Control groups need a machine that lets us have them; elsewhere these tests are skipped.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import graphs
from tests.conftest import Serve

pytestmark = pytest.mark.e2e

GROUPS = Path("/sys/fs/cgroup")
MEMORY_MB = 1000

ENTER = """
set -e
for group in "$1" "$2"; do echo $$ > "$group/cgroup.procs"; done
shift 2
exec unshare --cgroup --mount sh -ec '
for controller in cpu memory; do
    umount "/sys/fs/cgroup/$controller"
    mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/$controller"
done
exec "$@"' sh "$@"
"""
"""Into the groups; and from inside they look as if there were no others."""


@dataclass(frozen=True)
class Container:
    cpu: Path
    memory: Path

    @property
    def enter(self) -> list[str]:
        return ["sh", "-c", ENTER, "sh", str(self.cpu), str(self.memory)]

    @property
    def killed(self) -> int:
        """Processes that the kernel ended because there was no memory for them."""
        lines = dict(map(str.split, (self.memory / "memory.oom_control").read_text().splitlines()))
        return int(lines["oom_kill"])

    @property
    def most_used_mb(self) -> float:
        return int((self.memory / "memory.max_usage_in_bytes").read_text()) / 2**20


numbers = itertools.count()


@pytest.fixture
def container() -> Iterator[Container]:
    name = f"evalmode-test-{os.getpid()}-{next(numbers)}"
    made = Container(GROUPS / "cpu" / name, GROUPS / "memory" / name)
    folders = (made.cpu, made.memory)
    try:
        for folder in folders:
            folder.mkdir()
        (made.cpu / "cpu.cfs_quota_us").write_text("100000")  # of a period as long
        (made.memory / "memory.limit_in_bytes").write_text(str(MEMORY_MB * 2**20))
        subprocess.run([*made.enter, "true"], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        for folder in folders:
            with suppress(OSError):
                folder.rmdir()
        pytest.skip(f"this machine gives no control groups: {error}")
    yield made
    for folder in folders:
        for _ in range(100):  # until the last process is gone
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def test_one_cpu_and_its_memory_are_what_is_counted_on(container: Container) -> None:
    said = (
        "from service.cpus import usable_cpus; from service.limits import free_memory_bytes, held_at_most;"
        "print(usable_cpus(), held_at_most(2**40, processes=1), free_memory_bytes())"
    )
    inside = subprocess.run([*container.enter, sys.executable, "-c", said], capture_output=True, text=True, check=True)
    cpus, held_bytes, free_bytes = map(int, inside.stdout.split())
    assert (cpus, held_bytes) == (1, MEMORY_MB * 2**20 // 8)
    assert 0 < free_bytes < MEMORY_MB * 2**20


WIDTH = 2_000_000
ANSWER_BYTES = 4 * WIDTH
READERS = 200
"""Their answers together are more than the memory."""


def wide_model() -> onnx.ModelProto:
    """Each number becomes many: y = x * (1, 2, 3, ...)."""
    steps = {"steps": np.arange(1, WIDTH + 1, dtype=np.float32)[np.newaxis]}
    node = helper.make_node("Mul", ["x", "steps"], ["y"])
    return graphs.model([node], steps, x=(TensorProto.FLOAT, ["batch", 1]), y=["batch", WIDTH])


BODY = json.dumps(
    {
        "inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [0.5]}],
        "parameters": {"binary_data_output": True},
    }
).encode()
REQUEST = b"POST /v2/models/wide/infer HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)


def answered(address: str) -> None:
    """To who tries again as it is told."""
    until_s = time.monotonic() + 20
    while True:
        said = httpx.post(f"{address}/v2/models/wide/infer", content=BODY, timeout=30)
        if said.status_code != 429 or time.monotonic() > until_s:
            break
        time.sleep(int(said.headers["retry-after"]))
    assert said.status_code == 200, said.text
    got = np.frombuffer(said.content[-ANSWER_BYTES:], np.float32)
    np.testing.assert_array_equal(got, np.float32(0.5) * np.arange(1, WIDTH + 1, dtype=np.float32))


@pytest.mark.parametrize("at_once", [False, True], ids=["one after another", "at once"])
@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_do_not_read_take_no_memory_from_others(
    container: Container, serve: Serve, tmp_path: Path, workers: int, at_once: bool
) -> None:
    """Their answers together would be more than there is: nobody is ended for it, and who reads is answered."""
    onnx.save(wide_model(), tmp_path / "wide.onnx")
    flags = ("--workers", str(workers), "--max-batch-rows", "1", "--max-queue-s", "0")
    serving = serve(tmp_path / "wide.onnx", *flags, inside=container.enter)
    there = urlsplit(serving.address)
    begun: Counter[bytes] = Counter()
    with ExitStack() as open_clients:
        clients = []
        for _ in range(READERS):
            client = open_clients.enter_context(socket.create_connection((there.hostname, there.port), timeout=30))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            clients.append(client)
            if not at_once:
                client.sendall(REQUEST)
                begun[client.recv(12)] += 1
        if at_once:
            for client in clients:
                client.sendall(REQUEST)
            begun.update(client.recv(12) for client in clients)
        answered(serving.address)
        print(f"{dict(begun)}, at most {container.most_used_mb:.0f} of {MEMORY_MB} MB")
    answered(serving.address)
    assert begun.keys() == {b"HTTP/1.1 200", b"HTTP/1.1 429"}
    assert container.killed == 0
