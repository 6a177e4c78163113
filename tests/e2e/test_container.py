"""A container's limits: one CPU and some memory, given by the kernel as a container's engine asks for them.

Control groups need a machine that lets us have them; elsewhere these tests are skipped.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
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
        for folder in filter(Path.exists, folders):
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


SIDE = 800
LARGE_BYTES = 3 * SIDE * SIDE * 4
"""Of a sample and of its answer."""

READERS = 200
"""Their answers together are more than the memory."""


def large_model() -> onnx.ModelProto:
    node = helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["y"], epsilon=graphs.EPS)
    constants = {"gamma": graphs.GAMMA, "beta": graphs.BETA, "mean": graphs.MEAN, "var": graphs.VAR}
    shape = ["batch", 3, SIDE, SIDE]
    return graphs.model([node], constants, x=(TensorProto.FLOAT, shape), y=shape)


def large_request(host: str) -> bytes:
    said = {
        "inputs": [
            {
                "name": "x",
                "shape": [1, 3, SIDE, SIDE],
                "datatype": "FP32",
                "parameters": {"binary_data_size": LARGE_BYTES},
            }
        ],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(said).encode()
    return (
        b"POST /v2/models/large/infer HTTP/1.1\r\nhost: %b\r\nInference-Header-Content-Length: %d\r\n"
        b"content-length: %d\r\n\r\n%b" % (host.encode(), len(head), len(head) + LARGE_BYTES, head)
    )


def begun_answer(connection: socket.socket, request: bytes) -> bytes:
    """How the answer begins, which may come before all is sent."""
    rest = memoryview(request)
    while rest:
        readable, _, _ = select.select([connection], [connection], [], 30)
        if readable:
            break
        rest = rest[connection.send(rest[: 256 * 1024]) :]
    return connection.recv(12)


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_do_not_read_take_no_memory_from_others(
    container: Container, serve: Serve, tmp_path: Path, workers: int
) -> None:
    """Their answers together would be more than there is: nobody is ended for it, and who reads is answered."""
    onnx.save(large_model(), tmp_path / "large.onnx")
    serving = serve(tmp_path / "large.onnx", "--workers", str(workers), "--max-batch-rows", "1", inside=container.enter)
    there = urlsplit(serving.address)
    sample = np.random.default_rng(0).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    request = large_request(there.netloc) + sample.tobytes()
    by_channel = [values[:, None, None] for values in (graphs.GAMMA, graphs.BETA, graphs.MEAN, graphs.VAR)]
    gamma, beta, mean, var = by_channel
    wanted = (sample - mean) / np.sqrt(var + graphs.EPS) * gamma + beta

    def answered() -> None:
        """To who tries again as it is told."""
        body = request.partition(b"\r\n\r\n")[2]
        headers = {"Inference-Header-Content-Length": str(len(body) - LARGE_BYTES)}
        until_s = time.monotonic() + 20
        while True:
            said = httpx.post(f"{serving.address}/v2/models/large/infer", content=body, headers=headers, timeout=30)
            if said.status_code != 429 or time.monotonic() > until_s:
                break
            time.sleep(int(said.headers["retry-after"]))
        assert said.status_code == 200, said.text
        got = np.frombuffer(said.content[-LARGE_BYTES:], np.float32).reshape(sample.shape)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)

    first_lines: Counter[bytes] = Counter()
    with ExitStack() as connections:
        for _ in range(READERS):
            connection = connections.enter_context(socket.create_connection((there.hostname, there.port), timeout=30))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            try:
                first_lines[begun_answer(connection, request)] += 1
            except ConnectionError as error:
                print(repr(error), first_lines, container.killed, container.most_used_mb, serving.process.poll())
        answered()
        print(f"{dict(first_lines)}, at most {container.most_used_mb:.0f} of {MEMORY_MB} MB")
    answered()
    assert first_lines.keys() == {b"HTTP/1.1 200", b"HTTP/1.1 429"}
    assert container.killed == 0
