"""Triton: the server in the wheel nvidia-pytriton, its Python backend and, with batching, its dynamic batcher.

The wheel has no ONNX backend, so onnxruntime runs inside the Python backend.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from network import BATCHING, MAX_BATCH_SIZE, PORT, Network

PACKAGES = Path(sysconfig.get_path("purelib"))
TRITON = PACKAGES / "pytriton" / "tritonserver"
ROOM = Path(os.environ["BENCH_ROOM"])

CONFIG = """
backend: "python"
max_batch_size: {max_batch_size}
input [{{ name: "x" data_type: TYPE_FP32 dims: {taken} }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: {given} }}]
instance_group [{{ count: 1 kind: KIND_CPU }}]
{batching}
"""


def repository() -> Path:
    """A model repository with the one network."""
    network = Network()
    model = ROOM / "models" / network.path.stem
    (model / "1").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("model.py"), model / "1")
    batching = "dynamic_batching {}" if BATCHING else ""
    config = CONFIG.format(
        max_batch_size=MAX_BATCH_SIZE, taken=network.shape, given=network.answer_shape, batching=batching
    )
    (model / "config.pbtxt").write_text(config)
    return ROOM / "models"


def backends() -> Path:
    """The Python backend with the stub of this Python beside it."""
    python = ROOM / "backends" / "python"
    shutil.copytree(TRITON / "backends" / "python", python)
    for stub in (TRITON / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}").iterdir():
        shutil.copy(stub, python)
    return ROOM / "backends"


if __name__ == "__main__":
    libraries = [sysconfig.get_config_var("LIBDIR"), str(PACKAGES / "nvidia_pytriton.libs")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(libraries)
    os.environ["PYTHONPATH"] += f":{PACKAGES}"
    tritonserver = str(TRITON / "bin" / "tritonserver")
    options = {
        "model-repository": repository(), "backend-directory": backends(), "http-address": "127.0.0.1",
        "http-port": PORT, "allow-grpc": "false", "allow-metrics": "false", "log-info": "false",
    }  # fmt: skip
    os.execv(tritonserver, [tritonserver, *(f"--{name}={value}" for name, value in options.items())])
