"""`evalmode serve --workers 2` as its user meets it: one service, whichever process answers and whichever dies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import onnx
import pytest

from service.settings import Settings
from service.workers import supervisor
from tests import graphs
from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve, Serving
from tests.e2e.stuck import NEVER, SLOWLY, write_stuck_engine
from tests.service.hostile import a_loop_without_end

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not Path("/proc").exists(), reason="reads processes from /proc")]

SERVING = 2
PROCESSES = SERVING + 1
"""Below the supervisor: those that serve, and the spare."""

PREDICT = "/models/table/predict"
INDEX = "/v2/repository/index"


def children(pid: int) -> set[int]:
    """The processes whose parent this is, dead ones that were not waited for left out."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(status.parent.name))
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true: Callable[[], bool], *, within_s: float = 20) -> None:
    limit_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < limit_s, "it did not come to be in time"
        time.sleep(0.05)


def ask(serving: Serving, method: str, path: str, body: object = None) -> httpx.Response:
    """Over a connection of its own, so any worker may answer."""
    return httpx.request(method, serving.address + path, json=body, timeout=20)


def everywhere(serving: Serving, method: str, path: str, body: object = None) -> list[httpx.Response]:
    """Asked over 16 new connections at once, until both workers have answered."""

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=20) as client:
            return await asyncio.gather(*(client.request(method, serving.address + path, json=body) for _ in range(16)))

    answers: list[httpx.Response] = []

    def both_answered() -> bool:
        answers.extend(asyncio.run(burst()))
        return len({by(answer) for answer in answers}) == 2

    until(both_answered)
    return answers


def by(answer: httpx.Response) -> str:
    """Who answered: a request id begins with what no other process has."""
    return answer.headers["x-request-id"].partition("-")[0]


def successes(serving: Serving) -> int:
    (table,) = [one for one in ask(serving, "GET", "/v2/models/stats").json()["model_stats"] if one["name"] == "table"]
    count: int = table["inference_stats"]["success"]["count"]
    return count


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_table_bundle(tmp_path, name="table")
    write_table_bundle(tmp_path, name="rate", regression=True)
    return tmp_path


def test_two_processes_are_one_service(serve: Serve, models: Path) -> None:
    """Both answer, they say the same of themselves, and what they counted is what was sent."""
    serving = serve(models, "--workers", "2")
    assert re.search(r"^workers +2$", serving.printed, re.MULTILINE)
    assert serving.printed.count("table/1  ready") == 1
    until(lambda: len(children(serving.process.pid)) == PROCESSES)
    predictions = everywhere(serving, "POST", PREDICT, SAMPLE)
    assert {answer.status_code for answer in predictions} == {200}
    assert len({answer.content for answer in predictions}) == 1
    for answer in everywhere(serving, "GET", "/v2/models/table/stats"):
        assert answer.json()["model_stats"][0]["inference_stats"]["success"]["count"] == len(predictions)
    for method, path in [("POST", INDEX), ("GET", "/v2/health/ready"), ("GET", "/v2/models/table/config")]:
        assert len({answer.content for answer in everywhere(serving, method, path)}) == 1
    assert serving.stop() == 0


def test_what_one_loads_and_unloads_all_do(serve: Serve, models: Path) -> None:
    """A version that is put beside the first waits for `load`; one that is refused changes nothing anywhere."""
    serving = serve(models, "--workers", "2", "--reload-s", "0")
    write_table_bundle(models, name="table", version="2")

    def versions() -> set[str]:
        return {answer.json()["version"] for answer in everywhere(serving, "POST", PREDICT, SAMPLE)}

    assert versions() == {"1"}
    assert ask(serving, "POST", "/v2/repository/models/table/load").status_code == 200
    assert versions() == {"2"}

    bad = write_table_bundle(models, name="table", version="3")
    (bad / "model.onnx").write_bytes((bad / "model.onnx").read_bytes()[:-3])
    refusal = ask(serving, "POST", "/v2/repository/models/table/load")
    assert (refusal.status_code, refusal.json()["code"]) == (400, "load_refused")
    assert "version 3 of model 'table' was refused at the" in refusal.json()["error"]
    assert versions() == {"2"}
    (index,) = {answer.content for answer in everywhere(serving, "POST", INDEX)}
    table = {entry["version"]: entry["state"] for entry in json.loads(index) if entry["name"] == "table"}
    assert table == {"3": "UNAVAILABLE", "2": "READY"}

    assert ask(serving, "POST", "/v2/repository/models/table/unload").status_code == 200
    assert {answer.status_code for answer in everywhere(serving, "POST", PREDICT, SAMPLE)} == {503}
    again = ask(serving, "POST", "/v2/repository/models/table/unload")
    assert again.status_code == 200
    unknown = ask(serving, "POST", "/v2/repository/models/nobody/load")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_model")


def test_who_loads_at_the_same_time_ends_with_the_same(serve: Serve, models: Path) -> None:
    """Four callers, loading and unloading: in the end every worker says the same."""
    serving = serve(models, "--workers", "2")

    def change(verb: str) -> None:
        for _ in range(3):
            assert ask(serving, "POST", f"/v2/repository/models/table/{verb}").status_code in (200, 503)

    callers = [threading.Thread(target=change, args=[verb]) for verb in ("load", "unload", "load", "unload")]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len({answer.content for answer in everywhere(serving, "POST", INDEX)}) == 1
    assert len({answer.status_code for answer in everywhere(serving, "POST", PREDICT, SAMPLE)}) == 1


def test_a_killed_worker_is_replaced_while_the_other_serves(serve: Serve, models: Path) -> None:
    """Only what was on its connections may fail; its place is taken by one that serves what the others serve, no more.

    Totals do not go backwards, and a model that was unloaded does not come back.
    """
    serving = serve(models, "--workers", "2", "--reload-s", "0")
    assert ask(serving, "POST", "/v2/repository/models/rate/unload").status_code == 200
    write_table_bundle(models, name="table", version="2")  # nobody asked for it
    sent = len(everywhere(serving, "POST", PREDICT, SAMPLE))
    assert successes(serving) == sent
    first, second = sorted(children(serving.process.pid))[:SERVING]
    over = threading.Event()
    failed: list[str] = []
    answered: list[httpx.Response] = []

    def trickle() -> None:
        while not over.is_set():
            try:
                answered.append(ask(serving, "POST", PREDICT, SAMPLE))
                assert ask(serving, "GET", "/v2/health/ready").status_code == 200
            except httpx.TransportError as error:
                failed.append(str(error))

    trickling = threading.Thread(target=trickle)
    trickling.start()
    try:
        os.kill(first, signal.SIGKILL)
        until(lambda: not lives(first))
        until(lambda: len(children(serving.process.pid)) == PROCESSES)
        everywhere(serving, "GET", "/v2/health/live")
    finally:
        over.set()
        trickling.join()
    assert second in children(serving.process.pid)
    assert len(failed) <= 1
    assert {answer.status_code for answer in answered} == {200}
    assert sent < successes(serving) <= sent + len(answered)
    assert {answer.json()["version"] for answer in everywhere(serving, "POST", PREDICT, SAMPLE)} == {"1"}
    assert len({answer.content for answer in everywhere(serving, "POST", INDEX)}) == 1
    assert {answer.status_code for answer in everywhere(serving, "GET", "/v2/models/rate/ready")} == {503}


def test_there_is_always_a_spare(serve: Serve, models: Path) -> None:
    """It is nobody's worker, so that its end is no restart of one; and whoever dies next is replaced by the new one."""
    serving = serve(models, "--workers", "2")
    until(lambda: len(children(serving.process.pid)) == PROCESSES)
    before = children(serving.process.pid)
    for _ in range(2):
        spare = max(children(serving.process.pid))
        os.kill(spare, signal.SIGKILL)
        until(lambda spare=spare: not lives(spare))  # type: ignore[misc]
        until(lambda: len(children(serving.process.pid)) == PROCESSES)
    assert len(before & children(serving.process.pid)) == SERVING
    assert "evalmode_worker_restarts_total 0.0" in ask(serving, "GET", "/metrics").text
    os.kill(killed := min(before), signal.SIGKILL)
    new = max(children(serving.process.pid))
    until(lambda: killed not in children(serving.process.pid) and len(children(serving.process.pid)) == PROCESSES)
    everywhere(serving, "POST", PREDICT, SAMPLE)
    serving.process.terminate()
    serving.process.wait(timeout=30)
    assert serving.process.stdout is not None
    said = [json.loads(line) for line in serving.process.stdout if line.startswith("{")]
    assert new in {line["process"] for line in said if "is being loaded" in line["message"]}


def test_a_spare_that_died_is_not_counted_on(serve: Serve, models: Path) -> None:
    """A worker that dies then is replaced by a new process, at the first attempt, and there is a spare again."""
    serving = serve(models, "--workers", "2")
    until(lambda: len(children(serving.process.pid)) == PROCESSES)
    *workers, spare = sorted(children(serving.process.pid))
    for killed in (spare, workers[0]):
        os.kill(killed, signal.SIGKILL)
        until(lambda killed=killed: not lives(killed))  # type: ignore[misc]
    until(lambda: len(children(serving.process.pid)) == PROCESSES)
    everywhere(serving, "POST", PREDICT, SAMPLE)
    assert "evalmode_worker_restarts_total 1.0" in ask(serving, "GET", "/metrics").text


async def soon(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come")


def test_a_worker_that_hangs_is_replaced(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there and says nothing: stopped by a signal here, as by a driver that never returns."""
    monkeypatch.setattr(supervisor, "PING_S", 0.1)
    monkeypatch.setattr(supervisor, "HUNG_S", 1.0)

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            one = supervisor.Supervisor(models, Settings(workers=2), listening)
            running = asyncio.create_task(one.run())
            await soon(lambda: len(one._conductor.workers) == 2)
            hung, other = sorted(children(os.getpid()))[:SERVING]
            os.kill(hung, signal.SIGSTOP)
            await soon(lambda: hung not in children(os.getpid()) and len(one._conductor.workers) == 2)
            assert other in children(os.getpid())
            os.kill(os.getpid(), signal.SIGINT)
            await running

    asyncio.run(asyncio.wait_for(scenario(), 40))


def test_a_worker_whose_engine_does_not_come_back_is_replaced(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers all but that model, so nothing else would end it; the run was given up, and goes on all the same."""
    write_stuck_engine(tmp_path, monkeypatch)
    write_table_bundle(tmp_path / "models")
    serving = serve(tmp_path / "models", "--workers", "2", "--timeout-s", "0.2")
    pid = serving.process.pid
    until(lambda: len(children(pid)) == PROCESSES)
    before = children(pid)
    assert ask(serving, "POST", "/predict", {**SAMPLE, "amount": SLOWLY}).status_code == 504
    time.sleep(3)
    assert children(pid) == before
    assert ask(serving, "POST", "/predict", {**SAMPLE, "amount": NEVER}).status_code == 504
    until(lambda: len(children(pid) & before) == PROCESSES - 1 and len(children(pid)) == PROCESSES, within_s=40)
    assert {ask(serving, "POST", "/predict", SAMPLE).status_code for _ in range(20)} == {200}
    serving.process.send_signal(signal.SIGINT)
    said, _ = serving.process.communicate(timeout=20)
    assert "did not come back from a run of version 1 of model" in said
    assert serving.process.returncode == 0


def test_files_that_were_changed_under_a_served_version_are_not_mixed_in(serve: Serve, models: Path) -> None:
    """A new worker finds other bytes than the others serve: it does not serve them before `load` was asked for."""
    serving = serve(models, "--workers", "2", "--reload-s", "0")
    shutil.rmtree(models / "table")
    write_table_bundle(models, name="table", regression=True)
    killed = min(children(serving.process.pid))
    os.kill(killed, signal.SIGKILL)
    assert serving.process.stdout is not None
    for line in serving.process.stdout:
        if f"version 1 of model 'table' under '{models}' is not what the other workers serve" in line:
            break
    answers = [ask(serving, "POST", PREDICT, SAMPLE) for _ in range(10)]
    assert all("label" in answer.json() for answer in answers)
    assert ask(serving, "POST", "/v2/repository/models/table/load").status_code == 200
    assert not any("label" in answer.json() for answer in everywhere(serving, "POST", PREDICT, SAMPLE))


def test_who_cannot_serve_all_that_the_others_do_does_not_listen(serve: Serve, models: Path) -> None:
    """The folder of a served version is gone when a worker dies: the other answers for it, the log says what is missing
    and how many serve, and the service is whole again soon after the folder is."""
    serving = serve(models, "--workers", "2")
    (models / "table").rename(models / ".table")
    os.kill(min(children(serving.process.pid)), signal.SIGKILL)
    assert serving.process.stdout is not None
    for line in serving.process.stdout:
        if f"version 1 of model 'table' is gone from '{models}', and the other workers serve it" in line:
            break
    assert "1 of 2 serve, and another takes its place in" in line
    for _ in range(20):
        assert [ask(serving, "POST", f"/models/{name}/predict", SAMPLE).status_code for name in ("table", "rate")] == [
            200,
            200,
        ]
    assert "evalmode_workers 1.0" in ask(serving, "GET", "/metrics").text
    (models / ".table").rename(models / "table")
    assert {answer.status_code for answer in everywhere(serving, "POST", PREDICT, SAMPLE)} == {200}
    assert "evalmode_workers 2.0" in ask(serving, "GET", "/metrics").text
    assert any("all 2 workers serve again" in line for line in serving.process.stdout)


def test_a_spoiled_version_does_not_end_the_other_models(serve: Serve, models: Path) -> None:
    """All workers die while the files of one are spoiled: what is there is served again, and the log says it loudly."""
    serving = serve(models, "--workers", "2", "--reload-s", "0")
    with (models / "table" / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")
    for worker in children(serving.process.pid):
        os.kill(worker, signal.SIGKILL)
    assert serving.process.stdout is not None
    said = ""
    for line in serving.process.stdout:
        said += line
        if "rate/1  ready" in line:
            break
    assert "no worker serves any more, and none can serve what was served: version 1 of model 'table'" in said
    statuses = [answer.status_code for answer in everywhere(serving, "POST", "/models/rate/predict", SAMPLE)]
    assert set(statuses) == {200}
    assert {answer.status_code for answer in everywhere(serving, "POST", PREDICT, SAMPLE)} == {503}
    assert serving.stop() == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_of_them_well(serve: Serve, models: Path, signum: signal.Signals) -> None:
    """Exit code 0, nobody left, no traceback, and each says that it was asked to and that all were answered."""
    process = serve(models, "--workers", "2").process
    until(lambda: len(children(process.pid)) == PROCESSES)
    workers = children(process.pid)
    process.send_signal(signum)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    said = [json.loads(line)["message"].split(":")[0] for line in rest.splitlines() if line]
    assert sorted(said) == ["all were answered"] * SERVING + ["asked to end"] * SERVING
    assert not any(map(lives, workers))


def test_ctrl_c_in_a_terminal_ends_all_of_them_well(models: Path) -> None:
    """It reaches the whole group of processes, at any time: here while workers are still importing."""
    command = [sys.executable, "-m", "service.cli", "serve", str(models), "--port", "0", "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    until(lambda: len(children(process.pid)) == 2)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in said
    assert not any(map(lives, workers))


def test_what_is_being_answered_is_answered(serve: Serve, models: Path) -> None:
    """A request that has begun when the signal comes gets its answer before its worker goes."""
    serving = serve(models, "--workers", "2")
    body = json.dumps(SAMPLE).encode()
    there = urlsplit(serving.address)
    with socket.create_connection((there.hostname or "", there.port or 0), timeout=20) as connection:
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:10])
        until(lambda: successes(serving) == 0)  # a round through the workers
        serving.process.send_signal(signal.SIGTERM)
        until(lambda: len(children(serving.process.pid)) == 1)  # the other one is gone
        connection.sendall(body[10:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert serving.process.wait(timeout=20) == 0


def test_workers_do_not_outlive_the_supervisor(serve: Serve, models: Path) -> None:
    """Killed hard, it can tell nobody."""
    process = serve(models, "--workers", "2").process
    until(lambda: len(children(process.pid)) == PROCESSES)
    workers = children(process.pid)
    process.kill()
    until(lambda: not any(map(lives, workers)), within_s=8)


def refused_call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", "serve", *arguments, "--port", "0", "--workers", "2"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=50, check=False, env={**os.environ, **environment}
    )


def test_refusals_are_those_of_one_process(tmp_path: Path) -> None:
    """Same sentences, same exit codes."""
    onnx.save(graphs.batchnorm_model(training=True), tmp_path / "sick.onnx")
    refused = refused_call(str(tmp_path / "sick.onnx"))
    assert refused.returncode == 1
    assert refused.stdout.count("is in training mode (training_mode=1)") == 1
    assert refused.stderr.startswith("evalmode: no model under ")
    wrong = refused_call(str(tmp_path / "nothing"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("evalmode: there is nothing at ")


def test_it_gives_up_when_no_worker_can_be_started(models: Path, tmp_path: Path) -> None:
    """With a pause between attempts, and the reason."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys\nif 'service.workers.start_worker' in sys.orig_argv:\n    os._exit(3)\n"
    )
    began_s = time.monotonic()
    refused = refused_call(str(models), PYTHONPATH=f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert time.monotonic() - began_s > 1
    assert refused.returncode == 1
    assert "evalmode: no worker can be started: 3 in a row failed, and the last one ended with code 3" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_model_that_ends_the_workers_is_named(models: Path) -> None:
    """They are killed while they load it, here for the CPU time that it takes, as elsewhere for memory; they cannot say
    so themselves."""
    endless = models / "zz_endless" / "1"
    endless.mkdir(parents=True)
    (endless / "model.onnx").write_bytes(a_loop_without_end())
    serve = [sys.executable, "-m", "service.cli", "serve", str(models), "--port", "0", "--workers", "2"]
    limited = ["sh", "-c", 'ulimit -t 4; exec "$@"', "sh", *serve]
    refused = subprocess.run(limited, capture_output=True, text=True, timeout=140, check=False)
    assert refused.returncode == 1
    told = f"was ended by SIGKILL while it loaded version 1 of model 'zz_endless' ({endless})"
    assert f"evalmode: no worker can be started: 3 in a row failed, and the last one {told}" in refused.stderr
    assert refused.stderr.count(f"a worker {told}; 0 of 2 serve") == 2
    assert "table/1  ready" in refused.stdout
