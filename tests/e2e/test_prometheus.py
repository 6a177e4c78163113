"""A real Prometheus scrapes a real service and answers with the right numbers; its own tool tries the alerts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve, Serving

RULES = Path(__file__).parent.parent.parent / "deploy" / "prometheus"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="needs Prometheus: apt-get install prometheus",
    ),
]

Query = Callable[[str], float | None]

CONFIGURATION = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: evalmode
    static_configs: [{{targets: ["{target}"]}}]
"""


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[Serving], Query]]:
    """Start one that scrapes a service four times a second; it answers queries with their one number."""
    running: list[subprocess.Popen[bytes]] = []

    def start(serving: Serving) -> Query:
        folder = tmp_path / "prometheus"
        folder.mkdir()
        target = serving.address.removeprefix("http://")
        (folder / "prometheus.yml").write_text(CONFIGURATION.format(rules=RULES / "rules.yml", target=target))
        address = f"127.0.0.1:{free_port()}"
        running.append(
            subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

        def query(expression: str) -> float | None:
            try:
                answer = httpx.get(f"http://{address}/api/v1/query", params={"query": expression}, timeout=5)
            except httpx.TransportError:  # it is starting
                return None
            found = answer.json()["data"]["result"] if answer.status_code == 200 else []
            return float(found[0]["value"][1]) if found else None

        until(query, 'up{job="evalmode"}', 1)
        return query

    yield start
    for process in running:
        process.kill()
        process.wait(timeout=20)


def until(query: Query, expression: str, wanted: float, *, within_s: float = 30) -> None:
    limit_s = time.monotonic() + within_s
    while (found := query(expression)) != wanted:
        assert time.monotonic() < limit_s, f"{expression} is {found}, not {wanted}"
        time.sleep(0.1)


def predict(serving: Serving, times: int, body: object = SAMPLE) -> None:
    """Each over a connection of its own, so any worker may answer."""
    for _ in range(times):
        httpx.post(f"{serving.address}/predict", json=body, timeout=20)


@pytest.mark.parametrize("workers", [1, 2])
def test_queries_have_the_right_numbers(
    serve: Serve, prometheus: Callable[[Serving], Query], tmp_path: Path, workers: int
) -> None:
    write_table_bundle(tmp_path / "models", name="table")
    serving = serve(tmp_path / "models", "--workers", str(workers))
    query = prometheus(serving)
    predict(serving, 20)
    predict(serving, 3, {})
    host, port = serving.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"what is this\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    of_table = 'model="table", version="1", route="/predict"'
    until(query, f'sum(evalmode_requests_total{{{of_table}, code="200"}})', 20)
    until(query, f'sum(evalmode_requests_total{{{of_table}, code="400"}})', 3)
    until(query, 'sum(evalmode_refusals_total{model="table"})', 3)
    until(query, 'evalmode_requests_total{model="", route="other", code="400"}', 1)
    until(query, 'evalmode_request_duration_seconds_count{model="table"}', 20)
    until(query, "evalmode_workers", workers)
    until(query, "sum(evalmode_batch_rows_sum)", 20)
    p99_s = query("histogram_quantile(0.99, sum by (le) (evalmode_request_duration_seconds_bucket))")
    assert p99_s is not None
    assert 0 < p99_s < 1
    assert query('count(ALERTS{alertstate="firing"})') is None


def test_nothing_goes_backwards_when_a_worker_dies(
    serve: Serve, prometheus: Callable[[Serving], Query], tmp_path: Path
) -> None:
    """Neither when it is killed nor when a model is loaded anew; the restart is counted."""
    write_table_bundle(tmp_path / "models", name="table")
    serving = serve(tmp_path / "models", "--workers", "2")
    query = prometheus(serving)
    answered = 'sum(evalmode_requests_total{model="table", code="200"})'
    predict(serving, 20)
    until(query, answered, 20)
    memory = query("process_resident_memory_bytes") or 0
    assert memory > 3 * 30e6  # two workers and the supervisor
    children = Path(f"/proc/{serving.process.pid}/task/{serving.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    until(query, "evalmode_worker_restarts_total", 1)
    until(query, "evalmode_workers", 2)
    until(query, answered, 20)
    predict(serving, 5)
    until(query, answered, 25)
    assert httpx.post(f"{serving.address}/v2/repository/models/table/load", timeout=20).status_code == 200
    predict(serving, 5)
    until(query, answered, 30)
    until(query, 'evalmode_loads_total{model="table", result="admitted"}', 2)
    assert query("resets(evalmode_request_duration_seconds_count[5m])") == 0
    assert query('resets(evalmode_requests_total{code="200", route="/predict"}[5m])') == 0


def test_the_page_is_as_prometheus_likes_it(serve: Serve, tmp_path: Path) -> None:
    """Names, units and help, by its own linter."""
    write_table_bundle(tmp_path, name="table")
    serving = serve(tmp_path)
    predict(serving, 1)
    page = httpx.get(f"{serving.address}/metrics", timeout=20).content
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, timeout=20, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_every_alert_fires_when_it_should() -> None:
    tried = subprocess.run(
        ["promtool", "test", "rules", "rules_test.yml"], cwd=RULES, capture_output=True, timeout=20, check=False
    )
    assert tried.returncode == 0, tried.stderr.decode()
