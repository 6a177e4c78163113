"""What is asked: a network, samples of it, and the answers that every server is held against.

The answers are onnxruntime's, in process, one sample at a time. A server may run a sample inside a batch or fold
BatchNorm first: the same sums in another order. A sum of n float32 products, n up to 1,152 here, errs by about sqrt(n)
roundings of 6e-8 of its terms, so answers are the same within 1e-5 of the largest number in the row; the rows differ
from each other by far more, so a mixed-up batch is seen.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.serving import networks
from benchmarks.serving.peers.shared.network import Network, Tensors
from benchmarks.serving.wire import Request, Wire, request
from service.cpus import usable_cpus

ROOT = Path(__file__).parents[2]
CREDIT = ROOT / "models" / "credit"
CREDIT_TABLE = ROOT / "data" / "german_credit" / "german_credit.csv"
BUILD = ROOT / "build" / "bench"
SAME_ANSWER = 1e-5

ALL_CONNECTIONS = (1, 8, 32, 128)
USUAL = 32
FEW_CONNECTIONS = (1, 8)
CROWD = 1024
"""Connections in the one cell that only evalmode is led into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A network, and samples with their answers."""

    name: str
    title: str
    network: Path
    samples: Sequence[Mapping[str, Any]]
    """Each with a tensor `x`, or by feature names."""
    expected: Sequence[NDArray[np.float32]]
    wire: Wire
    """evalmode's, and the echo's."""
    connections: tuple[int, ...]
    crowd: bool = False
    threads: int = 1
    """Of a session, in process and in the peers."""

    def requests(self, wire: Wire) -> list[Request]:
        """Each sample on this wire."""
        if self.wire is Wire.NAMED:
            return [request(wire, np.empty(0, np.float32), sample) for sample in self.samples]
        return [request(wire, sample["x"]) for sample in self.samples]

    def same(self, i: int, answered: NDArray[np.float64]) -> bool:
        """Whether this is the answer to sample i."""
        expected = self.expected[i].astype(np.float64)
        if answered.shape != expected.shape:
            return False
        return bool(np.abs(answered - expected).max() <= SAME_ANSWER * np.abs(expected).max())


def dense() -> Workload:
    samples = [{"x": x} for x in networks.rows(64, seed=7)]
    return _workload(
        "dense", "a dense network, 30 numbers in JSON", _saved("dense", networks.dense), samples, Wire.V2,
        connections=ALL_CONNECTIONS, crowd=True,
    )  # fmt: skip


def credit() -> Workload:
    network = CREDIT / "1" / "model.onnx"
    features = {it["name"]: float if it["kind"] == "continuous" else str for it in Network(network).features}
    with CREDIT_TABLE.open(encoding="utf-8", newline="") as table:
        rows = [row for row, _ in zip(csv.DictReader(table), range(64), strict=False)]
    samples = [{name: kind(row[name]) for name, kind in features.items()} for row in rows]
    return _workload(
        "credit", "the shipped credit model, 18 features by name", network, samples, Wire.NAMED,
        connections=ALL_CONNECTIONS,
    )  # fmt: skip


def image_json() -> Workload:
    return _image("image-json", "a convolutional network, an image of 3 x 224 x 224 in JSON", Wire.V2)


def image_binary() -> Workload:
    return _image("image-binary", "the same network, the image in binary", Wire.BINARY)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "dense": dense,
    "credit": credit,
    "image-json": image_json,
    "image-binary": image_binary,
}


def _image(name: str, title: str, wire: Wire) -> Workload:
    samples = [{"x": x} for x in networks.images(8, seed=7)]
    network = _saved("image", networks.convolutional)
    # a convolution gains from more threads, and evalmode takes what it may: so does everybody
    return _workload(name, title, network, samples, wire, connections=FEW_CONNECTIONS, threads=usable_cpus())


def _workload(
    name: str,
    title: str,
    network: Path,
    samples: Sequence[Mapping[str, Any]],
    wire: Wire,
    *,
    connections: tuple[int, ...],
    crowd: bool = False,
    threads: int = 1,
) -> Workload:
    reference = Network(network)
    expected = [reference.run(reference.tensors(sample))[0] for sample in samples]
    return Workload(
        name=name, title=title, network=network, samples=samples, expected=expected, wire=wire,
        connections=connections, crowd=crowd, threads=threads,
    )  # fmt: skip


def tensors(workload: Workload) -> list[Tensors]:
    """Each sample as `session.run` takes it."""
    network = Network(workload.network)
    return [network.tensors(sample) for sample in workload.samples]


def _saved(name: str, made: Callable[[], onnx.ModelProto]) -> Path:
    path = BUILD / "models" / f"{name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(made(), path)
    return path
