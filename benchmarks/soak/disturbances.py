"""What happens to a service while it is asked: each in a thread of its own, until it is over."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from benchmarks.chaos.client import CLOSED, Cause, Failure
from benchmarks.chaos.requests import infer
from benchmarks.chaos.server import Held, Server
from benchmarks.graphs import dense

TURNED = "turned"
"""A model `y = version * x`, so that an answer tells which version gave it."""

RELOAD_S, KILL_EVERY_S, BURST_EVERY_S, BURST_S, SAMPLE_S = 5.0, 20.0, 20.0, 3.0, 1.0
BURST = "burst"
BURST_CONNECTIONS, BURST_ROWS, BURST_WIDTHS = 100, 64, (30, 2000, 2000, 2)
RIGHT = frozenset({200, 429})
"""What may be answered to a good request where there are bursts."""


@final
class During:
    """Runs work in threads until the block ends."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def every(self, seconds: float, work: Callable[[], None]) -> None:
        def run() -> None:
            while not self._over.wait(seconds):
                work()

        self._start(run)

    def always(self, work: Callable[[], None]) -> None:
        def run() -> None:
            while not self._over.is_set():
                work()

        self._start(run)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _start(self, run: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()


@final
class Turning:
    """Puts a new version of `turned` in its place again and again, and asks it all the time."""

    def __init__(self, models: Path) -> None:
        self._folder = models / TURNED
        self._version = 0
        self.answers: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.add()

    def add(self) -> None:
        """Written beside, then renamed."""
        self._version += 1
        beside = self._folder / f".{self._version}"
        beside.mkdir(parents=True)
        onnx.save(_times(self._version), beside / "model.onnx")
        beside.rename(self._folder / str(self._version))

    def ask(self, port: int) -> None:
        sent = [random.randrange(1000) for _ in range(4)]
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": sent}]}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request("POST", f"/v2/models/{TURNED}/infer", json.dumps(body))
            response = connection.getresponse()
            said = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            self.answers[CLOSED] += 1
            self.failures.append(Failure(Cause.SILENCE, f"{TURNED} did not answer: {error!r}"))
            return
        finally:
            connection.close()
        self.answers[str(response.status)] += 1
        if response.status == 200:
            version, data = int(said["model_version"]), said["outputs"][0]["data"]
            if data != [float(version * x) for x in sent]:
                self.failures.append(Failure(Cause.WRONG, f"version {version} of {TURNED} made {data} of {sent}"))
        elif response.status not in RIGHT:
            self.failures.append(Failure(Cause.STATUS, f"{TURNED} answered {response.status}: {said}"))


@final
class Killing:
    """Ends a worker, or the spare, hard; and no more after a while, so that those left can be seen to grow old."""

    def __init__(self, server: Server, *, until_s: float) -> None:
        self._server = server
        self._until_s = until_s
        self.at_s: list[float] = []
        """On the clock of `time.monotonic`, as all times here."""

    def one(self) -> None:
        workers = self._server.process.children()
        if len(workers) > 1 and time.monotonic() < self._until_s:
            self.at_s.append(time.monotonic())
            random.choice(workers).kill()


@final
class Bursts:
    """Far more at once than can be computed, for a model of their own: most is refused, and the others serve on."""

    def __init__(self, models: Path) -> None:
        network = models / BURST / "1" / "model.onnx"
        network.parent.mkdir(parents=True)
        onnx.save(dense(BURST_WIDTHS), network)
        rows = np.random.default_rng(1).standard_normal((BURST_ROWS, BURST_WIDTHS[0])).astype(np.float32)
        self._body = json.dumps(infer(rows)).encode()
        self._expected = InferenceSession(str(network)).run(None, {"x": rows})[0]
        self.failures: list[Failure] = []
        self.answers: Counter[str] = Counter()

    def one(self, port: int) -> None:
        until_s = time.monotonic() + BURST_S
        threads = [threading.Thread(target=self._ask, args=(port, until_s)) for _ in range(BURST_CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask(self, port: int, until_s: float) -> None:
        while time.monotonic() < until_s:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            try:
                connection.request("POST", f"/v2/models/{BURST}/infer", self._body)
                response = connection.getresponse()
                said = response.read()
            except (OSError, http.client.HTTPException) as error:
                self.answers[CLOSED] += 1
                self.failures.append(Failure(Cause.SILENCE, f"one of a burst was not answered: {error!r}"))
                continue
            finally:
                connection.close()
            self.answers[str(response.status)] += 1
            if response.status == 200:
                given = np.reshape(json.loads(said)["outputs"][0]["data"], self._expected.shape)
                if not np.allclose(given, self._expected, rtol=1e-4, atol=1e-5):  # other sizes of batch, other rounding
                    self.failures.append(Failure(Cause.WRONG, "one of a burst got another answer"))
            elif response.status not in RIGHT:
                self.failures.append(Failure(Cause.STATUS, f"one of a burst was answered {response.status}"))


@dataclass(frozen=True, slots=True)
class Sample:
    """What is held at a time, after so many requests."""

    at_s: float
    requests: int
    held: Held


@final
class Sampling:
    """What the processes of the server hold, as time goes by."""

    def __init__(self, server: Server, requests: Callable[[], int]) -> None:
        self._server = server
        self._requests = requests
        self.samples: list[Sample] = []

    def one(self) -> None:
        self.samples.append(Sample(time.monotonic(), self._requests(), self._server.held()))


def _times(factor: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        TURNED,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.array([factor], np.float32), "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
