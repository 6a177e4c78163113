"""`evalmode serve` as its user meets it: started from a shell, called over HTTP."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest

from tests import graphs
from tests.bundles import SAMPLE, write_table_bundle
from tests.conftest import Serve, Serving

pytestmark = pytest.mark.e2e

SHIPPED = Path(__file__).parents[2] / "models"


def printed_call(printed: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if line.startswith("curl")]
    return shlex.split(line)


def answer_to(serving: Serving) -> dict[str, Any]:
    """What the printed call prints, in a shell of its own."""
    call = [*printed_call(serving.printed), "-sS", "--fail-with-body"]
    answer = subprocess.run(call, capture_output=True, text=True, timeout=20, check=True)
    said: dict[str, Any] = json.loads(answer.stdout)
    return said


def test_the_printed_call_works_as_printed(serve: Serve) -> None:
    """Copied from the terminal into a shell, on the shipped model."""
    serving = serve(SHIPPED)
    assert "/docs" in serving.printed
    assert set(answer_to(serving)) == {"label", "probabilities", "model", "version"}
    assert serving.stop() == 0


def test_the_call_for_a_plain_onnx_file_works_too(serve: Serve, tmp_path: Path) -> None:
    """`evalmode serve model.onnx` needs no configuration."""
    onnx.save(graphs.batchnorm_model(), tmp_path / "norm.onnx")
    serving = serve(tmp_path / "norm.onnx")
    assert "equality with PyTorch is not known" in serving.printed
    assert answer_to(serving)["outputs"][0]["shape"] == [1, 3]


def test_http_and_in_process_give_the_same_answer(serve: Serve, tmp_path: Path) -> None:
    """`evalmode predict` is the service without the wire: every digit is equal."""
    example = json.loads(printed_call(serve(SHIPPED).printed)[-1])
    (tmp_path / "sample.json").write_text(json.dumps(example))
    command = [sys.executable, "-m", "service.cli", "predict", str(SHIPPED / "credit"), str(tmp_path / "sample.json")]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    over_http = httpx.post(f"{serve(SHIPPED).address}/predict", json=example).json()
    assert json.loads(alone.stdout) == over_http


def test_requests_share_batches_under_load(serve: Serve, tmp_path: Path) -> None:
    """One that only the graph can refuse fails alone, with 64 in flight."""
    onnx.save(graphs.embedding_model(), tmp_path / "lookup.onnx")
    url = f"{serve(tmp_path / 'lookup.onnx').address}/v2/models/lookup/infer"

    def body(index: int) -> dict[str, Any]:
        return {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "INT64", "data": [index]}]}

    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64), timeout=30) as client:
            return list(await asyncio.gather(*(client.post(url, json=body(i % 8)) for i in range(64))))

    for i, response in enumerate(asyncio.run(scenario())):
        assert response.status_code == (200 if i % 8 < 4 else 400)
        if i % 8 < 4:
            assert response.json()["outputs"][0]["data"] == [3.0 * (i % 8), 3.0 * (i % 8) + 1, 3.0 * (i % 8) + 2]


def test_training_mode_is_refused_at_the_door(tmp_path: Path) -> None:
    """The file that onnxruntime on a CPU would run without a word is not served: exit code 1 and the reason."""
    onnx.save(graphs.batchnorm_model(training=True), tmp_path / "sick.onnx")
    command = [sys.executable, "-m", "service.cli", "serve", str(tmp_path / "sick.onnx"), "--port", "0"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "BatchNormalization 'norm' is in training mode (training_mode=1)" in refused.stdout
    assert "Traceback" not in refused.stderr


def test_a_body_that_is_too_large_is_refused_and_the_next_is_answered(serve: Serve, tmp_path: Path) -> None:
    """Over a real connection: the refusal arrives, and nobody else is harmed."""
    write_table_bundle(tmp_path)
    url = f"{serve(tmp_path, '--body-limit-bytes', '5000').address}/predict"
    with httpx.Client(timeout=20) as client:
        assert client.post(url, content=b" " * 5_000_000).status_code == 413
        assert client.post(url, json=SAMPLE).status_code == 200


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_well(serve: Serve, tmp_path: Path, signum: signal.Signals) -> None:
    """Ctrl-C and the orchestrator's SIGTERM are the ordinary end: exit code 0, no traceback."""
    write_table_bundle(tmp_path)
    process = serve(tmp_path).process
    process.send_signal(signum)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_health_and_documentation_answer(serve: Serve) -> None:
    address = serve(SHIPPED).address
    assert httpx.get(f"{address}/v2/health/ready").json() == {"ready": True}
    assert httpx.get(f"{address}/docs").status_code == 200
    document = httpx.get(f"{address}/openapi.json").json()
    body = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert httpx.post(f"{address}/predict", json=body["example"]).status_code == 200
