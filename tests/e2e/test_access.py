"""`evalmode serve` with keys and over TLS, by two workers, as its users meet it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

from service.keys import made_key
from tests import graphs
from tests.asking import save
from tests.certificates import write_certificate
from tests.conftest import Serve

pytestmark = pytest.mark.e2e


def test_keys_and_tls_with_two_workers(serve: Serve, tmp_path: Path) -> None:
    """What is printed works, a key that is taken away opens nothing any more in either, and no log has one."""
    save(tmp_path / "models", "norm", graphs.batchnorm_model())
    certificate = write_certificate(tmp_path)
    secret, kept = made_key("shop", ["predict"])
    keys = tmp_path / "keys.txt"
    keys.write_text(kept.line)
    flags = ["--keys-file", keys, "--tls-certificate", certificate.certificate, "--tls-key", certificate.key]
    serving = serve(tmp_path / "models", "--workers", "2", "--log-level", "debug", *map(str, flags))
    assert serving.address.startswith("https://")
    (call,) = [line for line in serving.printed.splitlines() if line.startswith("curl")]
    call = f"{call} -sS --fail-with-body"
    printed = subprocess.run(call, shell=True, env={**os.environ, "KEY": secret}, capture_output=True, timeout=20)
    assert printed.returncode == 0, printed
    body = shlex.split(call)[shlex.split(call).index("-d") + 1]

    def statuses(headers: dict[str, str]) -> set[int]:
        """On connections of their own, so that both workers answer."""
        found = set()
        for _ in range(12):
            with httpx.Client(verify=certificate.trusting(), trust_env=False, headers=headers) as client:
                found.add(client.post(f"{serving.address}/v2/models/norm/infer", content=body).status_code)
                found.add(client.get(f"{serving.address}/v2/models/norm").status_code)
        return found

    assert statuses({}) == {401}
    assert statuses({"x-api-key": secret}) == {200}
    other, other_kept = made_key("shop", ["predict"])
    keys.write_text(other_kept.line)
    limit_s = time.monotonic() + 10
    while statuses({"x-api-key": secret}) != {401}:
        assert time.monotonic() < limit_s
    assert statuses({"x-api-key": other}) == {200}
    assert serving.stop() == 0
    assert serving.process.stdout is not None
    said = serving.printed + serving.process.stdout.read()
    assert secret not in said
    assert other not in said


def test_tritons_client_sends_a_key(serve: Serve, tmp_path: Path) -> None:
    save(tmp_path / "models", "norm", graphs.batchnorm_model())
    secret, kept = made_key("shop", ["predict"])
    (tmp_path / "keys.txt").write_text(kept.line)
    serving = serve(tmp_path / "models", "--keys-file", str(tmp_path / "keys.txt"))
    headers = {"Authorization": f"Bearer {secret}"}
    with tritonclient.http.InferenceServerClient(serving.address.removeprefix("http://")) as client:
        assert client.is_server_ready()
        tensor = tritonclient.http.InferInput("x", [1, 3], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 3), np.float32))
        assert client.infer("norm", [tensor], headers=headers).as_numpy("y").shape == (1, 3)
        assert client.get_model_metadata("norm", headers=headers)["name"] == "norm"
        with pytest.raises(InferenceServerException, match="this takes an API key"):
            client.infer("norm", [tensor])
        with pytest.raises(InferenceServerException, match="lacks the right 'manage'"):
            client.unload_model("norm", headers=headers)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed; apt-get install chromium")
def test_the_documentation_in_a_browser(serve: Serve, tmp_path: Path) -> None:
    """What its Content-Security-Policy lets run is enough: every route is shown, or, with keys, where to enter one."""
    save(tmp_path / "models", "norm", graphs.batchnorm_model())
    _, kept = made_key("shop", ["predict"])
    (tmp_path / "keys.txt").write_text(kept.line)

    def shown(*flags: str) -> str:
        address = serve(tmp_path / "models", *flags).address
        command = [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom", f"{address}/docs",
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False).stdout

    page = shown()
    assert page.count('class="opblock ') > 10
    assert "/v2/models/norm/infer" in page.replace("\u200b", "").replace("<wbr>", "")
    locked = shown("--keys-file", str(tmp_path / "keys.txt"))
    assert "Authorize with an API key that may predict." in locked
    assert "/v2/models" not in locked
    assert 'class="opblock ' not in locked


def test_a_wrong_file_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    from service.cli import run

    save(tmp_path / "models", "norm", graphs.batchnorm_model())
    certificate = write_certificate(tmp_path)
    for workers in ("1", "2"):
        arguments = ["serve", str(tmp_path / "models"), "--port", "0", "--workers", workers]
        assert run([*arguments, "--keys-file", str(tmp_path / "none")]) == 2
        assert run([*arguments, "--tls-certificate", str(certificate.certificate)]) == 2
