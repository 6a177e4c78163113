"""MLServer: `mlserver start` of a folder with a custom runtime, in one process; with batching, 32 rows or 2 ms."""

import json
import os
import sys
from pathlib import Path

from network import BATCH_WAIT_S, BATCHING, MAX_BATCH_SIZE, PORT, Network

FOLDER = Path(os.environ["BENCH_ROOM"])

if __name__ == "__main__":
    model = {"name": Network().path.stem, "implementation": "runtime.Answering"}
    if BATCHING:
        model |= {"max_batch_size": MAX_BATCH_SIZE, "max_batch_time": BATCH_WAIT_S}
    settings = {
        "host": "127.0.0.1", "http_port": PORT, "grpc_port": PORT + 1, "metrics_port": PORT + 2, "parallel_workers": 0,
        "debug": False, "access_log": False,
    }  # fmt: skip
    (FOLDER / "model-settings.json").write_text(json.dumps(model))
    (FOLDER / "settings.json").write_text(json.dumps(settings))
    os.environ["PYTHONPATH"] += f":{Path(__file__).parent}"
    mlserver = str(Path(sys.executable).with_name("mlserver"))
    os.execv(mlserver, [mlserver, "start", str(FOLDER)])
