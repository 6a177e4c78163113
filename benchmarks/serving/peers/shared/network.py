"""What a user writes around onnxruntime, the same in every peer's server: a session, and a sample's way through it.

Rule 1: nothing here knows a server; the harness reads it too, for the answers that all servers are held against.
Rule 2: sessions do not spin, and have as many threads as evalmode's own default has where more than one helps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import
import onnxruntime

BATCHING = os.environ.get("BENCH_BATCHING") == "1"
WORKLOAD = os.environ.get("BENCH_WORKLOAD", "dense")
PORT = int(os.environ.get("BENCH_PORT", "0"))
THREADS = int(os.environ.get("BENCH_THREADS", "1"))
MAX_BATCH_SIZE = 32
BATCH_WAIT_S = 0.002

Tensors = dict[str, NDArray[Any]]


class Network:
    """An ONNX file, and the features of its passport where it has one."""

    def __init__(self, path: Path | None = None, *, threads: int = THREADS) -> None:
        self.path = path or Path(os.environ["BENCH_NETWORK"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        self._output = [self._session.get_outputs()[0].name]
        self.shape: list[int] = self._session.get_inputs()[0].shape[1:]
        self.answer_shape: list[int] = self._session.get_outputs()[0].shape[1:]

    def run(self, tensors: Tensors) -> NDArray[Any]:
        """One row of float32 for each row of the tensors."""
        answer: NDArray[Any] = self._session.run(self._output, tensors)[0]
        return answer

    def tensors(self, request: Mapping[str, Any] | Sequence[float] | bytes | bytearray | memoryview) -> Tensors:
        """One sample, as the wire brought it, with a batch axis of one."""
        match request:
            case bytes() | bytearray() | memoryview():
                return {"x": np.frombuffer(request, dtype="<f4").reshape(1, *self.shape)}
            case {"x": values}:
                return {"x": np.array(values, dtype=np.float32).reshape(1, *self.shape)}
            case Mapping():
                return self._encoded(request)
            case values:
                return {"x": np.array(values, dtype=np.float32).reshape(1, *self.shape)}

    def answer(self, row: NDArray[Any]) -> dict[str, Any]:
        """What the caller is told about one row."""
        values: list[float] = row.tolist()
        if not self._has_features:
            return {"y": values}
        classes = self._signature["target"]["classes"]
        return {"label": classes[values.index(max(values))], "probabilities": dict(zip(classes, values, strict=True))}

    def _encoded(self, sample: Mapping[str, Any]) -> Tensors:
        """Named features as tensors: category i is index i + 1, and index 0 is 'missing'."""
        continuous = [float(sample[name]) for name in self._continuous]
        categorical = [indices.get(sample[name], 0) for name, indices in self._categorical.items()]
        return {
            "continuous": np.array([continuous], dtype=np.float32),
            "categorical": np.array([categorical], dtype=np.int64),
        }

    @cached_property
    def _signature(self) -> dict[str, Any]:
        signature: dict[str, Any] = json.loads(self.path.with_name("model.json").read_text())["signature"]
        return signature

    @cached_property
    def _has_features(self) -> bool:
        return self.path.with_name("model.json").exists()

    @cached_property
    def _continuous(self) -> list[str]:
        return [feature["name"] for feature in self.features if feature["kind"] == "continuous"]

    @cached_property
    def _categorical(self) -> dict[str, dict[str, int]]:
        return {
            feature["name"]: {category: i for i, category in enumerate(feature["categories"], start=1)}
            for feature in self.features
            if feature["kind"] == "categorical"
        }

    @property
    def features(self) -> list[dict[str, Any]]:
        features: list[dict[str, Any]] = self._signature["features"]
        return features


def stacked(many: Sequence[Tensors]) -> Tensors:
    """Several samples as one batch."""
    return {name: np.concatenate([tensors[name] for tensors in many]) for name in many[0]}
