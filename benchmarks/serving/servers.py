"""The servers side by side: how each is run, how each is asked, and what is left out and why.

Every server has one worker and serves on a port of 127.0.0.1. A peer's server file stands in `peers/PEER/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.installing import EVALMODE, PEERS
from benchmarks.serving.process import Running, clean_environment
from benchmarks.serving.wire import Wire
from benchmarks.serving.workloads import BUILD, CREDIT, Workload

ECHO = "echo"
FASTAPI = "fastapi"
NEAR = (ECHO, EVALMODE, FASTAPI, "mosec-batching", "triton-batching")
"""Those that bars are judged by, and the peers that come nearest."""
OWN = {"dense": Wire.V2, "credit": Wire.NAMED, "image-json": Wire.V2, "image-binary": Wire.BINARY}
USER_CODE = {"dense": Wire.ROW, "credit": Wire.NAMED, "image-json": Wire.ROW, "image-binary": Wire.RAW}
TENSORS_ONLY = "takes tensors only; a sample by name would need a client of its own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A way to serve a network."""

    name: str
    peer: str
    """Its folder in `peers/`, and its environment."""
    title: str
    how: str
    asked: Mapping[str, Wire | str]
    """For each workload the wire, or why it is left out."""
    path: str = "/predict"
    """For every wire but the Open Inference Protocol's, which has a path of its own."""
    command: tuple[str, ...] = ("python", "server.py")
    batching: bool = False

    def url(self, workload: Workload, port: int) -> str:
        infers = self.asked[workload.name] in (Wire.V2, Wire.BINARY)
        path = f"/v2/models/{workload.network.stem}/infer" if infers else self.path
        return f"http://127.0.0.1:{port}{path}"

    def started(self, workload: Workload, port: int, *, programs: Path, constant: Path) -> Running:
        """The server as a process.

        Args:
            programs: the folder of its environment's programs.
            constant: what the echo answers.
        """
        room = BUILD / self.peer / "room"
        command = [it.format(port=port, served=_served(workload)) for it in self.command]
        return Running(
            [str(programs / command[0]), *command[1:]],
            environment=self._environment(workload, port, programs=programs, constant=constant, room=room),
            folder=PEERS / self.peer if self.peer != EVALMODE else room,
            log=BUILD / self.peer / f"{self.name}-{workload.name}.log",
            room=room,
        )

    def _environment(
        self, workload: Workload, port: int, *, programs: Path, constant: Path, room: Path
    ) -> dict[str, str]:
        if self.peer == EVALMODE:
            return clean_environment(programs)
        return clean_environment(
            programs,
            PYTHONPATH=str(PEERS / "shared"),
            PYTHONDONTWRITEBYTECODE="1",
            BENCH_NETWORK=str(workload.network),
            BENCH_WORKLOAD=workload.name,
            BENCH_THREADS=str(workload.threads),
            BENCH_PORT=str(port),
            BENCH_BATCHING=str(int(self.batching)),
            BENCH_CONSTANT=str(constant),
            BENCH_ROOM=str(room),
            BENTOML_DO_NOT_TRACK="True",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
            MOSEC_PORT=str(port),
        )


def _served(workload: Workload) -> Path:
    return CREDIT if workload.name == "credit" else workload.network


SERVERS = [
    Server(
        name=ECHO, peer="echo", title="bare echo", asked=OWN,
        how="uvicorn with uvloop and httptools; an ASGI callable that reads the body and answers a constant of the "
        "size and with the headers of evalmode's answer",
    ),
    Server(
        name=EVALMODE, peer=EVALMODE, title="evalmode", asked=OWN,
        command=("evalmode", "serve", "{served}", "--port", "{port}"),
        how="`evalmode serve PATH --port N`, nothing else",
    ),
    Server(
        name=FASTAPI, peer="fastapi", title="FastAPI + pydantic", asked=USER_CODE,
        how="uvicorn; an `async def` route with pydantic models in and out, `session.run` inside",
    ),
    Server(
        name="litserve", peer="litserve", title="LitServe", asked=USER_CODE,
        how="a `LitAPI`, `workers_per_device=1`",
    ),
    Server(
        name="litserve-batching", peer="litserve", title="LitServe, batching", asked=USER_CODE, batching=True,
        how="the same with `max_batch_size=32, batch_timeout=0.002`",
    ),
    Server(
        name="bentoml", peer="bentoml", title="BentoML", asked=USER_CODE,
        command=("bentoml", "serve", "server:Service", "--host", "127.0.0.1", "--port", "{port}"),
        how="`@bentoml.service(workers=1)`, metrics and access log off",
    ),
    Server(
        name="bentoml-batching", peer="bentoml", title="BentoML, batching", batching=True,
        asked={**dict.fromkeys(USER_CODE, Wire.BATCH), "image-binary": "a batchable API takes no raw bytes"},
        command=("bentoml", "serve", "server:Service", "--host", "127.0.0.1", "--port", "{port}"),
        how="the same with `@bentoml.api(batchable=True, max_batch_size=32)`",
    ),
    Server(
        name="mlserver", peer="mlserver", title="MLServer", path="",
        asked={**OWN, "credit": TENSORS_ONLY, "image-binary": "has no binary tensors over HTTP"},
        how="`mlserver start` with a custom `MLModel` and `NumpyCodec`, `parallel_workers: 0`",
    ),
    Server(
        name="mlserver-batching", peer="mlserver", title="MLServer, batching", path="", batching=True,
        asked={**OWN, "credit": TENSORS_ONLY, "image-binary": "has no binary tensors over HTTP"},
        how="the same with adaptive batching, `max_batch_size: 32, max_batch_time: 0.002`",
    ),
    Server(
        name="mosec", peer="mosec", title="mosec", asked=USER_CODE, path="/inference",
        how="one `Worker`",
    ),
    Server(
        name="mosec-batching", peer="mosec", title="mosec, batching", asked=USER_CODE, path="/inference", batching=True,
        how="the same with `max_batch_size=32, max_wait_time=1` (ms, the least there is)",
    ),
    Server(
        name="ray", peer="ray", title="Ray Serve", asked=USER_CODE, path="/",
        how="one deployment with one replica, `max_ongoing_requests=256`, `RAY_SERVE_THROUGHPUT_OPTIMIZED=1`, "
        "dashboard off",
    ),
    Server(
        name="ray-batching", peer="ray", title="Ray Serve, batching", asked=USER_CODE, path="/", batching=True,
        how="the same with `@serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)`",
    ),
    Server(
        name="triton", peer="triton", title="Triton", asked={**OWN, "credit": TENSORS_ONLY},
        how="`tritonserver` of the wheel nvidia-pytriton, which has no ONNX backend: onnxruntime runs inside its "
        "Python backend, one instance",
    ),
    Server(
        name="triton-batching", peer="triton", title="Triton, batching", batching=True,
        asked={**OWN, "credit": TENSORS_ONLY},
        how="the same with `dynamic_batching {}`",
    ),
]  # fmt: skip
