"""New versions come while everybody asks: nobody notices but by the answers."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import onnx
import pytest

from tests import graphs
from tests.conftest import Serve
from tests.e2e.test_workers import ask, children, everywhere, until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not Path("/proc").exists(), reason="reads memory from /proc")]

PATH = "/v2/models/norm/infer"
ROWS = np.array([[5.0, -3.0, 40.0], [4.0, -2.5, 41.0], [6.0, -3.5, 39.0]], dtype=np.float32)
BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [3, 3], "datatype": "FP32", "data": ROWS.reshape(-1).tolist()}]}
).encode()


def put(models: Path, version: int) -> None:
    """As a careful deployment does it: written beside its place, then renamed into it."""
    beside = models / "norm" / f".{version}"
    beside.mkdir(parents=True)
    onnx.save(graphs.batchnorm_model(mean=graphs.MEAN + np.float32(version)), beside / "model.onnx")
    beside.rename(models / "norm" / str(version))


def computed_by(values: list[float]) -> set[int]:
    """The versions that the rows of an answer come from: each moves the mean of every channel by one more."""
    scale = graphs.GAMMA / np.sqrt(graphs.VAR + graphs.EPS)
    mean = ROWS - (np.array(values).reshape(ROWS.shape) - graphs.BETA) / scale
    versions = mean - graphs.MEAN
    assert np.abs(versions - versions.round()).max() < 0.01
    return set(versions.round().astype(int).reshape(-1).tolist())


@dataclass
class Clients:
    """Threads that ask until they are told to stop."""

    address: str
    stop: threading.Event = field(default_factory=threading.Event)
    wrong: list[object] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    answered: int = 0

    def ask_on(self, *, keep_alive: bool) -> None:
        there = urlsplit(self.address)
        connection = http.client.HTTPConnection(there.hostname or "", there.port, timeout=20)
        try:
            while not self.stop.is_set():
                connection.request("POST", PATH, BODY)
                response = connection.getresponse()
                self.take(response.status, json.loads(response.read()))
                if not keep_alive:
                    connection.close()
        except Exception as error:
            self.wrong.append(repr(error))
        finally:
            connection.close()

    def take(self, status: int, said: dict[str, Any]) -> None:
        if status != 200:
            self.wrong.append(said)
            return
        version = int(said["model_version"])
        if computed_by(said["outputs"][0]["data"]) != {version}:
            self.wrong.append(said)
        self.answered += 1
        self.versions.append(version)


def resident_mb(pids: set[int]) -> float:
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * 4096 / 2**20


@pytest.mark.timeout(500)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("reloads", [pytest.param(5, id="short"), pytest.param(30, id="long", marks=pytest.mark.slow)])
def test_no_request_notices_a_reload(serve: Serve, tmp_path: Path, workers: int, reloads: int) -> None:
    """No failure, no answer of two versions, and the memory is back: within 5 % of what it was after a first reload."""
    put(tmp_path, 1)
    serving = serve(tmp_path, "--workers", str(workers), "--reload-s", "0.3")
    pids = {*sorted(children(serving.process.pid))[:workers]} if workers > 1 else {serving.process.pid}
    clients = Clients(serving.address)

    def live() -> list[str]:
        versions: list[str] = httpx.get(f"{serving.address}/v2/models/norm", timeout=20).json()["versions"]
        return versions

    def rest_mb() -> float:
        time.sleep(2.5)  # what is free is given back after a second
        return resident_mb(pids)

    def under_load(first: int, count: int) -> None:
        clients.stop.clear()
        asking = [threading.Thread(target=clients.ask_on, kwargs={"keep_alive": i % 3 > 0}) for i in range(6)]
        for thread in asking:
            thread.start()
        try:
            for version in range(first, first + count):
                put(tmp_path, version)
                until(lambda version=version: live() == [str(version)])  # type: ignore[misc]
                time.sleep(1)
                shutil.rmtree(tmp_path / "norm" / str(version - 1))
        finally:
            clients.stop.set()
            for thread in asking:
                thread.join()

    under_load(2, 2)
    warm_mb = rest_mb()
    began_s = time.monotonic()
    under_load(4, reloads)
    every_s = (time.monotonic() - began_s) / reloads
    after_mb = rest_mb()
    print(
        f"{clients.answered} answers, a new version every {every_s:.1f} s, {warm_mb:.1f} MB and then {after_mb:.1f} MB"
    )
    assert clients.wrong == []
    assert set(clients.versions) == set(range(1, 4 + reloads))
    assert after_mb < warm_mb * 1.05


def test_an_alias_moves_in_all_workers_at_once(serve: Serve, tmp_path: Path) -> None:
    """And is there again after a restart."""
    put(tmp_path, 1)
    put(tmp_path, 2)
    flags = ("--workers", "2", "--versions", "latest:2")
    serving = serve(tmp_path, *flags)

    def answered_by(version: str) -> set[str]:
        path = f"/v2/models/norm{version}"
        return {answer.json()["evalmode"]["version"] for answer in everywhere(serving, "GET", path)}

    assert (answered_by(""), answered_by("/versions/1")) == ({"2"}, {"1"})
    path = "/v2/repository/models/norm/aliases/stable"
    refused = ask(serving, "PUT", path, {"version": "3"})
    assert (refused.status_code, refused.json()["code"]) == (404, "unknown_version")
    assert ask(serving, "PUT", path, {"version": "1"}).json()["survives_restart"] is True
    assert (answered_by(""), answered_by("/versions/stable"), answered_by("/versions/2")) == ({"1"}, {"1"}, {"2"})
    assert serving.stop() == 0
    serving = serve(tmp_path, *flags)
    assert answered_by("") == {"1"}
