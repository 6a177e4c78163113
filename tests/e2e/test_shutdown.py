"""SIGTERM under load: not ready first, then everything that was accepted is answered, then exit 0."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve, Serving
from tests.e2e.test_workers import children, until
from tests.service.hostile import a_loop_without_end

pytestmark = pytest.mark.e2e

CLIENTS = 12

ROOT = Path(__file__).parent.parent.parent
NEVER, SLOWLY = 666, 333
STUCK = f"""
import time
from service import coalescing, http_server, runtime

http_server.DRAIN_LIMIT_S = 2.0
run, init = runtime.OnnxRuntime.run, coalescing.Coalescer.__init__

def stuck(self, tensors):
    for amount, run_s in (({NEVER}, 1000.0), ({SLOWLY}, 1.0)):
        if any((tensor == amount).any() for tensor in tensors):
            time.sleep(run_s)
    return run(self, tensors)

def in_threads(self, runtime, **said):
    init(self, runtime, **{{**said, "inline_rows": 0}})

runtime.OnnxRuntime.run = stuck
coalescing.Coalescer.__init__ = in_threads
"""
"""What Python does at the start of each process: for one amount the engine never comes back, for another it takes long;
and the end is not waited for as long as it is."""


class Client(threading.Thread):
    """Asks one sample after the other, on a new connection where the last was closed, until nobody accepts any more."""

    def __init__(self, serving: Serving, *, stays: bool) -> None:
        super().__init__(daemon=True)
        there = urlsplit(serving.address)
        self._address = (there.hostname or "", there.port or 0)
        self._stays = stays
        body = json.dumps(SAMPLE).encode()
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        self._request = (head + ("" if stays else "Connection: close\r\n") + "\r\n").encode() + body
        self.answered = 0
        self.lost: list[str] = []

    def run(self) -> None:
        while True:
            try:
                connection = socket.create_connection(self._address, timeout=10)
            except ConnectionError:
                return
            with connection:
                while self._asked(connection) and self._stays:
                    pass

    def _asked(self, connection: socket.socket) -> bool:
        """Send a request; whether another may be sent on this connection."""
        try:
            connection.sendall(self._request)
            answer = b""
            while not whole(answer):
                part = connection.recv(65536)
                if not part:
                    self.lost.append(f"closed after {answer!r}")
                    return False
                answer += part
        except OSError as error:
            self.lost.append(repr(error))
            return False
        if not answer.startswith(b"HTTP/1.1 200 "):
            self.lost.append(repr(answer[:200]))
        self.answered += 1
        return b"connection: close" not in answer


def whole(answer: bytes) -> bool:
    """It has as many bytes as its head says."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return length is not None and len(body) == int(length[1])


def under_load(serving: Serving) -> list[Client]:
    clients = [Client(serving, stays=i % 3 > 0) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(0.5)
    return clients


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("turn", range(2))
def test_nothing_that_was_accepted_is_lost(serve: Serve, tmp_path: Path, workers: str, turn: int) -> None:
    write_table_bundle(tmp_path)
    serving = serve(tmp_path, "--workers", workers, "--shutdown-delay-s", "0.5")
    clients = under_load(serving)
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(timeout=20) == 0
    for client in clients:
        client.join(timeout=10)
    assert [client.lost for client in clients] == [[]] * CLIENTS
    assert all(client.answered > 10 for client in clients)


def test_it_is_not_ready_first(serve: Serve, tmp_path: Path) -> None:
    """For as long as was said, it refuses to be ready, answers, and asks each connection to end."""
    write_table_bundle(tmp_path)
    serving = serve(tmp_path, "--shutdown-delay-s", "3")
    with httpx.Client(base_url=serving.address, timeout=5) as client:
        assert client.post("/predict", json=SAMPLE).headers.get("connection") is None
        serving.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        ready = client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["error"]) == (503, "the service is being stopped")
        (model,) = client.post("/v2/repository/index").json()
        assert client.get(f"/v2/models/{model['name']}/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        answer = client.post("/predict", json=SAMPLE)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    start = time.monotonic()
    serving.process.send_signal(signal.SIGTERM)  # who says it twice does not want to wait
    assert serving.process.wait(timeout=20) == 0
    assert time.monotonic() - start < 1.5


def test_ctrl_c_does_not_wait(serve: Serve, tmp_path: Path) -> None:
    write_table_bundle(tmp_path)
    serving = serve(tmp_path, "--shutdown-delay-s", "30")
    start = time.monotonic()
    assert serving.stop() == 0
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_version_that_is_being_tried_is_given_up(serve: Serve, tmp_path: Path, workers: str) -> None:
    """It would not be done for a minute; who had it loaded is told, and the process ends well."""
    write_table_bundle(tmp_path, name="table")
    flags = ("--workers", workers, "--shutdown-delay-s", "0", "--reload-s", "0", "--admission-limit-s", "60")
    serving = serve(tmp_path, *flags)
    endless = tmp_path / "table" / "2"
    endless.mkdir()
    (endless / "model.onnx").write_bytes(a_loop_without_end())
    answers: list[httpx.Response] = []

    def load() -> None:
        answers.append(httpx.post(f"{serving.address}/v2/repository/models/table/load", timeout=60))

    loading = threading.Thread(target=load)
    loading.start()
    until(lambda: any(map(is_trying, descendants(serving.process.pid))))
    time.sleep(2)  # it has been read, and runs
    assert loading.is_alive()
    start = time.monotonic()
    serving.process.send_signal(signal.SIGTERM)
    said, _ = serving.process.communicate(timeout=40)
    assert time.monotonic() - start < 8
    loading.join(timeout=10)
    assert (serving.process.returncode, "Traceback" in said) == (0, False), said
    assert [answer.status_code for answer in answers] == [503]


def descendants(pid: int) -> set[int]:
    own = children(pid)
    return own.union(*map(descendants, own))


def is_trying(pid: int) -> bool:
    try:
        return b"service.try_version" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("amount", "code"), [(NEVER, 1), (SLOWLY, 0)], ids=["never", "slowly"])
def test_an_engine_that_does_not_come_back_does_not_keep_the_process(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str, amount: int, code: int
) -> None:
    """It ends by itself, says why, and not with 0; one that only takes long is waited for, for a while."""
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    write_table_bundle(tmp_path / "models")
    serving = serve(tmp_path / "models", "--workers", workers, "--shutdown-delay-s", "0", "--timeout-s", "0.2")
    assert httpx.post(f"{serving.address}/predict", json={**SAMPLE, "amount": amount}).status_code == 504
    start = time.monotonic()
    serving.process.send_signal(signal.SIGTERM)
    said, _ = serving.process.communicate(timeout=20)
    assert serving.process.returncode == code, said
    assert time.monotonic() - start < 8
    assert ("a model is still being computed or admitted" in said) == (code == 1)
    assert ("1 of the workers ended without finishing" in said) == (code == 1 and workers == "2")
