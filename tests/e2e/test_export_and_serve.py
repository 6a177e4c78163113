"""The whole road of a network of one's own: exported, served, asked over HTTP, and looked at in a browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import export_model
from tests.conftest import Serve
from tests.export import healthy

pytestmark = pytest.mark.e2e


def ask(url: str, name: str, x: Tensor) -> dict[str, Any]:
    tensor = {"name": name, "shape": list(x.shape), "datatype": "FP32", "data": x.flatten().tolist()}
    response = httpx.post(url, json={"inputs": [tensor]}, timeout=20)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize("name", ["resnet", "densenet"])
def test_one_sample_gets_eval_modes_answer(name: str, serve: Serve, tmp_path: Path) -> None:
    """Row by row over HTTP, within the tolerance that the passport states; folded or not is said in the metadata."""
    network, (x,) = healthy.HEALTHY[name]()
    exported = export_model(network, x[:16], name="net", models=tmp_path)
    address = serve(tmp_path).address
    assert exported.passport.golden is not None
    tolerance = exported.passport.golden.tolerances["output"].absolute
    with torch.no_grad():
        wanted = network(x[16:24]).numpy()
    for row, answer in zip(x[16:24], wanted, strict=True):
        (output,) = ask(f"{address}/v2/models/net/infer", "input", row[None])["outputs"]
        assert np.abs(np.array(output["data"]) - answer.flatten()).max() <= tolerance
    said = httpx.get(f"{address}/v2/models/net").json()["evalmode"]
    assert set(said["folded"]) | set(said["kept"]) == {layer.layer for layer in exported.passport.batchnorm}
    assert bool(said["kept"]) == (name == "densenet")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed; apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_fits_a_browser(width: int, tmp_path: Path) -> None:
    """Nothing is wider than the window, also with a long name, at desktop and phone width."""
    network = nn.Sequential()
    network.add_module(
        "a_layer_with_a_very_long_name_that_nobody_could_break_into_parts_of_any_kind", nn.BatchNorm1d(7)
    )
    network.add_module("dense", nn.Linear(7, 3))
    for seed in range(80):
        network.train()(torch.randn(32, 7, generator=torch.Generator().manual_seed(seed)))
    exported = export_model(network, torch.randn(9, 7), name="a" * 60, models=tmp_path)
    page = exported.report.read_text(encoding="utf-8")
    # the page itself lets no script in: the measuring one goes into a copy without that line
    widths = "document.documentElement.scrollWidth + ' of ' + document.documentElement.clientWidth"
    measuring = f"<script>document.title = {widths}</script></body>"
    policy = next(line for line in page.splitlines() if "Content-Security-Policy" in line)
    (tmp_path / "measured.html").write_text(page.replace(policy, "").replace("</body>", measuring), encoding="utf-8")
    # a window cannot be as narrow as a phone; a frame can
    frame = f"<iframe src='measured.html' style='width:{width}px;height:2000px;border:0' onload=\"document.title = "
    frame += 'this.contentDocument.title"></iframe>'
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,2000",
        "--virtual-time-budget=4000", "--dump-dom", (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False).stdout
    title = dom.partition("<title>")[2].partition("</title>")[0]
    content, window = map(int, title.split(" of "))
    assert 0.9 * width < content <= window <= width, dom[:500]
