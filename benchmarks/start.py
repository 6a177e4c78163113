"""How long from starting `evalmode serve` to the first prediction, and how much memory it then holds.

Question: what does an operator wait for after a restart, and what does a container need?
Quantity: seconds from the start of the process until the first answer of POST /predict has been read, and resident
memory after 1,000 answers more. Medians of five starts on a warm disk, the shipped model.
Limit: `python -c "import numpy, onnx, onnxruntime, fastapi, uvicorn, cyclopts, pydantic_settings"`, timed in turn.
The bars are 1.5 s and 150 MB.
"""

from __future__ import annotations

import json
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.environment import environment
from service.bundle import PASSPORT_FILE, Passport

MODELS = Path(__file__).parent.parent / "models"
STARTS = 5
MORE_ANSWERS = 1000
IMPORTS = "import numpy, onnx, onnxruntime, fastapi, uvicorn, cyclopts, pydantic_settings"


def main() -> None:
    passport = Passport.model_validate_json((MODELS / "credit" / "1" / PASSPORT_FILE).read_bytes())
    body = json.dumps(passport.signature.example()).encode()
    starts_s, resident_mb, imports_s = [], [], []
    for _ in range(STARTS):
        imports_s.append(import_s())
        start_s, mb = one_start(body)
        starts_s.append(start_s)
        resident_mb.append(mb)
    report = {
        "first_prediction_s": round(statistics.median(starts_s), 3),
        "imports_alone_s": round(statistics.median(imports_s), 3),
        "resident_mb": round(statistics.median(resident_mb), 1),
        **environment(),
    }
    print(f"first prediction after {report['first_prediction_s']} s (bar 1.5), imports {report['imports_alone_s']} s")
    print(f"resident memory {report['resident_mb']} MB (bar 150)")
    print(json.dumps(report))


def import_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, env={"ORT_DISABLE_TELEMETRY": "1"})
    return time.perf_counter() - started


def one_start(body: bytes) -> tuple[float, float]:
    """Seconds to the first answer, and MB of resident memory after many."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.perf_counter()
    command = [sys.executable, "-m", "service.cli", "serve", str(MODELS), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not answered(port, body):
            if process.poll() is not None or time.perf_counter() - started > 60:
                sys.exit("evalmode serve did not answer")
            time.sleep(0.005)
        first_s = time.perf_counter() - started
        for _ in range(MORE_ANSWERS):
            answered(port, body)
        return first_s, resident(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def answered(port: int, body: bytes) -> bool:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return b'"label"' in response.read()
    except urllib.error.URLError:
        return False


def resident(pid: int) -> float:
    """MB of resident memory, as Linux counts it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


if __name__ == "__main__":
    main()
