"""The networks that are served, without PyTorch: drawn weights, and running statistics that fit the activations.

Each BatchNorm stands behind its layer and before the ReLU. Its running statistics are the mean and variance that the
layer really has over seeded rows, so activations keep their size, as in a trained network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

FEATURES = 30
IMAGE = (3, 224, 224)
CLASSES = 10
EPS = 1e-5
OPSET = 17

Array = NDArray[np.float32]


def dense(seed: int = 0) -> onnx.ModelProto:
    """30-200-100-2 with BatchNorm and ReLU behind each hidden layer. x: float32[batch, 30]."""
    graph = _Growing(np.random.default_rng(seed), rows(256, seed=seed + 1))
    for wide, width in ((FEATURES, 200), (200, 100)):
        graph.gemm(wide, width)
        graph.norm(width)
        graph.add("Relu")
    graph.gemm(100, 2)
    return graph.model("dense")


def convolutional(seed: int = 0) -> onnx.ModelProto:
    """Four convolutions of stride 2 with BatchNorm and ReLU, a mean, ten classes. x: float32[batch, 3, 224, 224]."""
    graph = _Growing(np.random.default_rng(seed), images(2, seed=seed + 1))
    for wide, width in ((3, 32), (32, 64), (64, 128), (128, 128)):
        graph.conv(wide, width)
        graph.norm(width)
        graph.add("Relu")
    graph.add("GlobalAveragePool")
    graph.add("Flatten")
    graph.gemm(128, CLASSES)
    return graph.model("image")


def rows(count: int, *, seed: int) -> Array:
    """A table's rows, float32[count, 30]: each column has a mean and a scale of its own, and four decimals."""
    generator = np.random.default_rng(seed)
    mean, scale = np.linspace(-3, 40, FEATURES), np.geomspace(0.1, 20, FEATURES)
    return np.round(mean + scale * generator.normal(size=(count, FEATURES)), 4).astype(np.float32)


def images(count: int, *, seed: int) -> Array:
    """Pixels of 8 bits, normalised as for ImageNet, float32[count, 3, 224, 224]."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(count, *IMAGE)) / 255
    mean = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    return np.asarray((pixels - mean) / std, dtype=np.float32)


@dataclass(slots=True)
class _Growing:
    """A chain of nodes that knows what some rows become at its end."""

    random: np.random.Generator
    rows: Array
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=lambda: ["x"])

    def gemm(self, wide: int, width: int) -> None:
        self.add("Gemm", self._drawn((width, wide), fan_in=wide), self._drawn((width,), fan_in=wide), transB=1)

    def conv(self, wide: int, width: int) -> None:
        kernel = self._drawn((width, wide, 3, 3), fan_in=wide * 9)
        self.add("Conv", kernel, strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3])

    def norm(self, width: int) -> None:
        gamma, beta = self.random.uniform(0.5, 1.5, width), self.random.normal(0, 0.3, width)
        reached = self._reached()
        other_axes = tuple(axis for axis in range(reached.ndim) if axis != 1)
        mean, var = reached.mean(other_axes), reached.var(other_axes)
        self.add("BatchNormalization", *(it.astype(np.float32) for it in (gamma, beta, mean, var)), epsilon=EPS)

    def add(self, kind: str, *constants: Array, **attributes: Any) -> None:
        output = f"{kind.lower()}_{len(self.nodes)}"
        names = [f"{output}.{i}" for i in range(len(constants))]
        self.constants |= dict(zip(names, constants, strict=True))
        self.nodes.append(helper.make_node(kind, [self.outputs[-1], *names], [output], name=output, **attributes))
        self.outputs.append(output)

    def model(self, name: str) -> onnx.ModelProto:
        """What has grown, as a model with the output `y`."""
        width = self._reached().shape[1]
        self.nodes[-1].output[0] = "y"
        return self._built(name, helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width]))

    def _drawn(self, shape: tuple[int, ...], *, fan_in: int) -> Array:
        return self.random.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)

    def _reached(self) -> Array:
        """What the rows are behind the last node."""
        so_far = self._built("so_far", helper.make_tensor_value_info(self.outputs[-1], TensorProto.FLOAT, None))
        found: Any = ReferenceEvaluator(so_far).run(None, {"x": self.rows})
        return np.asarray(found[0])

    def _built(self, name: str, output: onnx.ValueInfoProto) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *self.rows.shape[1:]])
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, name, [x], [output], constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
