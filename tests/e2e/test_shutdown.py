"""SIGTERM under load: not ready first, then everything that was accepted is answered, then exit 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from benchmarks.faults.faults import ended
from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve
from tests.e2e.stuck import NEVER, SLOWLY, write_stuck_engine
from tests.e2e.test_workers import children, until
from tests.service.hostile import a_loop_without_end

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("turn", range(2))
def test_nothing_that_was_accepted_is_lost(tmp_path: Path, workers: int, turn: int) -> None:
    write_table_bundle(tmp_path / "models")
    end = ended(tmp_path / "models", SAMPLE, tmp_path / "log", workers=workers)
    assert end.faults == []
    assert end.answered > 100


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
    serving.process.send_signal(signal.SIGINT)  # who says so does not want to wait
    said, _ = serving.process.communicate(timeout=20)
    assert (serving.process.returncode, "Traceback" in said) == (0, False), said
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("workers", ["1", "2"])
def test_to_say_it_twice_changes_nothing(serve: Serve, tmp_path: Path, workers: str) -> None:
    """systemd sends SIGTERM to each process of the service, and the supervisor sends another to each worker."""
    write_table_bundle(tmp_path)
    serving = serve(tmp_path, "--workers", workers, "--shutdown-delay-s", "5")
    pid = serving.process.pid
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    start = time.monotonic()
    for each in (pid, *map(int, below), pid):
        with suppress(ProcessLookupError):  # the spare, which has nothing to wait for
            os.kill(each, signal.SIGTERM)
        time.sleep(0.2)  # of two that wait to be delivered, the system makes one
    assert httpx.post(f"{serving.address}/predict", json=SAMPLE).status_code == 200
    assert serving.process.wait(timeout=20) == 0
    assert time.monotonic() - start >= 4.9


def test_a_process_that_is_late_waits_all_the_same(serve: Serve, tmp_path: Path) -> None:
    """It was stopped for longer than a turn, and the signal came meanwhile."""
    write_table_bundle(tmp_path)
    serving = serve(tmp_path, "--shutdown-delay-s", "2")
    serving.process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    serving.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    serving.process.send_signal(signal.SIGCONT)
    assert serving.process.wait(timeout=20) == 0
    assert time.monotonic() - start >= 1.9


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
    write_stuck_engine(tmp_path, monkeypatch)
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


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_can_be_ended_while_it_starts(tmp_path: Path, signum: signal.Signals, code: int, workers: str) -> None:
    """Whatever it is doing then, importing the engine for one: no traceback, and at once."""
    write_table_bundle(tmp_path, name="table")
    command = [sys.executable, "-m", "service.cli", "serve", str(tmp_path), "--port", "0", "--workers", workers]
    for after_s in (0.0, 0.1, 0.2, 0.4, 0.6):
        starting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        until(lambda pid=starting.pid: has_handlers(pid))  # type: ignore[misc]
        time.sleep(after_s)
        starting.send_signal(signum)
        said, _ = starting.communicate(timeout=20)
        assert starting.returncode in (code, 0), said  # 0: it served already
        assert "Traceback" not in said


def has_handlers(pid: int) -> bool:
    """Of both signals, of which SIGTERM has its own last: `SigCgt` of proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)
