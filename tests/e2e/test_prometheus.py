"""A real Prometheus scrapes a real service and answers with the right numbers; its own tool tries the alerts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import httpx
import pytest

from service.keys import made_key
from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve, Serving
from tests.deploy.manifests import ALERTS, DASHBOARD, SCRAPED, as_asked, configured_prometheus

RULES = Path(__file__).parent.parent.parent / "deploy" / "prometheus"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="needs Prometheus: apt-get install prometheus",
    ),
]


@final
@dataclass(frozen=True, slots=True)
class Query:
    """What a running Prometheus answers."""

    address: str

    def __call__(self, expression: str) -> float | None:
        """The first number."""
        found = self.found(expression)
        return float(found[0]["value"][1]) if found else None

    def found(self, expression: str) -> list[Any]:
        """Every series."""
        try:
            answer = httpx.get(f"{self.address}/api/v1/query", params={"query": expression}, timeout=5)
        except httpx.TransportError:  # it is starting
            return []
        found: list[Any] = answer.json()["data"]["result"] if answer.status_code == 200 else []
        return found

    def alerts(self) -> dict[str, str]:
        """Each alert that it watches for, with how its expression fares."""
        groups = httpx.get(f"{self.address}/api/v1/rules", timeout=5).json()["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}


Start = Callable[..., Query]

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
def prometheus(tmp_path: Path) -> Iterator[Start]:
    """Start one, and wait until it has scraped the service: four times a second, or as a configuration says."""
    running: list[subprocess.Popen[bytes]] = []

    def start(serving: Serving, configuration: Path | None = None) -> Query:
        folder = tmp_path / "prometheus"
        folder.mkdir()
        if configuration is None:
            configuration = folder / "prometheus.yml"
            target = serving.address.removeprefix("http://")
            configuration.write_text(CONFIGURATION.format(rules=RULES / "rules.yml", target=target))
        address = f"127.0.0.1:{free_port()}"
        running.append(
            subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        query = Query(f"http://{address}")
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


def predict(serving: Serving, times: int, body: object = SAMPLE, *, key: str = "") -> None:
    """Each over a connection of its own, so any worker may answer."""
    for _ in range(times):
        httpx.post(f"{serving.address}/predict", json=body, headers={"x-api-key": key} if key else {}, timeout=20)


@pytest.mark.parametrize("workers", [1, 2])
def test_queries_have_the_right_numbers(serve: Serve, prometheus: Start, tmp_path: Path, workers: int) -> None:
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


def test_nothing_goes_backwards_when_a_worker_dies(serve: Serve, prometheus: Start, tmp_path: Path) -> None:
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


def test_the_prometheus_of_compose_fills_every_panel(serve: Serve, prometheus: Start, tmp_path: Path) -> None:
    """As it is configured there, with the key that it is given: it watches for every alert, and each query of the
    dashboard has an answer, with the labels of its legend."""
    write_table_bundle(tmp_path / "models", name="table")
    asks, kept_of_it = made_key("prometheus", ["metrics"])
    calls, kept_of_caller = made_key("shop", ["predict"])
    keys = tmp_path / "keys"
    keys.write_text(f"{kept_of_it.line}\n{kept_of_caller.line}\n")
    serving = serve(tmp_path / "models", "--workers", "2", "--keys-file", str(keys))
    configuration = configured_prometheus(tmp_path / "container", key=asks)
    there = SCRAPED["static_configs"][0]["targets"][0]
    here = configuration.read_text().replace(there, serving.address.removeprefix("http://")).replace("15s", "250ms")
    configuration.write_text(here)
    predict(serving, 1, key=calls)
    predict(serving, 1, {}, key=calls)
    query = prometheus(serving, configuration)
    predict(serving, 10, key=calls)
    predict(serving, 3, {}, key=calls)
    until(query, 'sum(evalmode_requests_total{code="200", model="table"})', 11)
    until(query, 'sum(evalmode_requests_total{code="400", model="table"})', 4)
    assert query.alerts() == {alert["alert"]: "ok" for alert in ALERTS}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            found = query.found(as_asked(target["expr"]))
            assert found, (panel["title"], target["expr"])
            labels = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            assert all(labels <= series["metric"].keys() for series in found), (panel["title"], found)


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
