"""What stays as it is: an idle server, one model among fifty, memory over many predictions, health beside a slow model.

Question: what does `evalmode serve` cost when nothing happens, and what does one caller feel of the others?
Quantities: CPU seconds of an idle server in ten seconds; the median latency of one model when it is the only one and
when 49 others are served beside it, in alternating rounds; resident memory after 1,000 and after 10,000 requests with
an image of 3x224x224 in binary, and after 100 and 1,000 in JSON; how resident memory grows over 1,000,000 predictions
of the shipped model, by name, after 100,000 to warm up, by least squares, with its standard error; the slowest of 50
health checks while a model of about half a second runs.
Limits: no CPU; a ratio of 1; no growth, and of the last at most 1 MB in 100,000; milliseconds.
"""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx

from benchmarks.environment import environment
from benchmarks.graphs import dense, pooled
from benchmarks.serving.load import driven, write_bodies
from benchmarks.serving.workloads import CREDIT, credit
from benchmarks.soak.soak import slope
from benchmarks.started import started

RESULT = Path(__file__).parent / "results" / "steady.json"
MODELS = 50
ROUNDS = 5
IDLE_S = 10
WARM_UP, MILLION, MOST_MB = 100_000, 1_000_000, 1.0
SLOW_LAYERS = 250
"""Half a second and more, on two cores."""
JSON_HEADERS = {"Content-Type": "application/json"}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        grown = a_million(root)
        report = {
            **idle(root),
            **one_among_many(root),
            **images(root),
            **grown,
            **health_beside_a_slow_model(root),
            **environment(),
        }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULT}")
    return 0 if grown["mb_in_100000_predictions"] < MOST_MB else 1


def idle(root: Path) -> dict[str, float]:
    with started(saved(root, "dense", dense([30, 200, 100, 2]))) as server:
        ask(server.port, "dense", np.zeros((1, 30), np.float32), 100)
        before_s = server.cpu_s
        time.sleep(IDLE_S)
        used_s = server.cpu_s - before_s
    print(f"an idle server used {used_s:.2f} s of CPU in {IDLE_S} s")
    return {"idle_cpu_s": round(used_s, 2)}


def one_among_many(root: Path) -> dict[str, float]:
    """The ratio of the medians of each round, and its median."""
    models = root / "many"
    graph = dense([30, 200, 100, 2])
    for number in range(MODELS):
        (models / f"dense{number}" / "1").mkdir(parents=True)
        onnx.save(graph, models / f"dense{number}" / "1" / "model.onnx")
    row = np.ones((1, 30), np.float32)
    with started(models / "dense0") as one, started(models) as many:
        ratios = []
        for _ in range(ROUNDS):
            alone_s = statistics.median(ask(one.port, "dense0", row, 2000))
            ratios.append(statistics.median(ask(many.port, "dense0", row, 2000)) / alone_s)
    ratio = statistics.median(ratios)
    print(f"with {MODELS} models served, the latency of one is {ratio:.2f} times what it is alone")
    return {"latency_among_50_models": round(ratio, 3)}


def images(root: Path) -> dict[str, float]:
    report = {}
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with started(saved(root, "pixels", pooled())) as server:
        for form, count in (("binary", 10_000), ("json", 1000)):
            ask(server.port, "pixels", image, count // 10, binary=form == "binary")
            early = server.resident_mb
            ask(server.port, "pixels", image, count - count // 10, binary=form == "binary")
            growth_mb = report[f"{form}_growth_mb"] = round(server.resident_mb - early, 1)
            print(f"{count} images in {form}: memory {growth_mb:+.1f} MB after the first {count // 10}")
    return report


def a_million(root: Path) -> dict[str, float]:
    workload, bodies = credit(), root / "bodies"
    write_bodies(bodies, workload.requests(workload.wire))
    count, asked, held_mb = 0, [], []
    with started(CREDIT) as server:
        while count < WARM_UP + MILLION:
            load = driven(f"{server.address}/predict", bodies, connections=32, seconds=5)
            if load.non_2xx or load.socket_errors:
                raise SystemExit(f"{load.non_2xx} answers were not 2xx, {load.socket_errors} socket errors")
            count += load.requests
            if count >= WARM_UP:
                asked.append(count / 100_000)
                held_mb.append(server.resident_mb)
    slope_mb, error_mb = slope(asked, held_mb)
    print(f"{count:,} predictions: memory {slope_mb:+.3f} ± {error_mb:.3f} MB in 100,000 of them")
    return {"mb_in_100000_predictions": round(slope_mb, 4), "its_standard_error_mb": round(error_mb, 4)}


def health_beside_a_slow_model(root: Path) -> dict[str, float]:
    with started(saved(root, "slow", dense([4000] * SLOW_LAYERS)), "--admission-limit-s", "600") as server:
        run_s: list[float] = []
        slow = threading.Thread(
            target=lambda: run_s.extend(ask(server.port, "slow", np.ones((1, 4000), np.float32), 3))
        )
        slow.start()
        checks_s: list[float] = []
        while slow.is_alive() and len(checks_s) < 50:
            checks_s.append(get_s(server.port, "/v2/health/live"))
            time.sleep(0.02)
        slow.join()
    slowest_ms = max(checks_s) * 1e3
    print(f"beside runs of {max(run_s):.2f} s, the slowest of {len(checks_s)} health checks took {slowest_ms:.1f} ms")
    return {"slow_run_s": round(max(run_s), 3), "slowest_health_ms": round(slowest_ms, 2)}


def ask(port: int, model: str, x: np.ndarray, times: int, *, binary: bool = False) -> list[float]:
    """Seconds of each of so many predictions over one connection."""
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
    headers = JSON_HEADERS
    if binary:
        head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": x.nbytes}}]}).encode()
        body = head + x.tobytes()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    else:
        body = json.dumps({"inputs": [{**tensor, "data": x.ravel().tolist()}]}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        response = connection.getresponse()
        said = response.read()
        seconds.append(time.perf_counter() - start)
        if response.status != 200:
            raise SystemExit(f"{model}: {response.status} {said[:300]!r}")
    connection.close()
    return seconds


def get_s(port: int, path: str) -> float:
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    connection.getresponse().read()
    connection.close()
    return time.perf_counter() - start


def saved(root: Path, name: str, model: onnx.ModelProto) -> Path:
    path = root / f"{name}.onnx"
    onnx.save(model, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
