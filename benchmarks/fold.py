"""What folding BatchNorm is worth: one row through onnxruntime, folded by us against as the file came.

Question: does folding make a served model faster than onnxruntime's own optimiser makes it?
Quantity: for each network, the median time of one run of the graph as it came divided by that of the folded graph, one
row, one thread, full optimisation in both; runs alternate, so that both meet the same machine. Above 1 is faster.
Limit: the graph without its BatchNormalization nodes cannot be faster than the layers that are left.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.environment import environment
from export.conversion import convert
from service import bundle
from service.graph.fold import fold
from service.numerics import made_up_rows
from service.runtime import OnnxRuntime, place

CREDIT = Path(__file__).parent.parent / "models" / "credit" / "1"
ROUNDS, RUNS = 30, 200


def main() -> None:
    ratios = {name: ratio(make()) for name, make in NETWORKS.items()}
    for name, (times, folded, total) in ratios.items():
        print(f"{name}: {times:.2f} times as fast, {folded} of {total} BatchNorm folded")
    print(json.dumps({**{name: round(times, 3) for name, (times, _, _) in ratios.items()}, **environment()}))


def ratio(model: onnx.ModelProto) -> tuple[float, int, int]:
    """Time as it came by time folded, and how many layers were folded of how many."""
    found = fold(model)
    plain, folded = (OnnxRuntime(it.SerializeToString(), place("cpu"), threads=1) for it in (model, found.model))
    row = [array[:1] for array in made_up_rows(plain.inputs, count=2)]
    times = []
    for _ in range(ROUNDS):
        pair = []
        for runtime in (plain, folded):
            started = time.perf_counter()
            for _ in range(RUNS):
                runtime.run(row)
            pair.append(time.perf_counter() - started)
        times.append(pair[0] / pair[1])
    return statistics.median(times), sum(1 for it in found.folds if it.into), len(found.folds)


def credit() -> onnx.ModelProto:
    return bundle.read(CREDIT, name="credit", version="1").model


def dense(*, before_activation: bool, width: int = 64, depth: int = 3) -> onnx.ModelProto:
    """A small dense network with BatchNorm on one side of its activations."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide in (20, *[width] * (depth - 1)):
        norm, activation = nn.BatchNorm1d(width), nn.ReLU()
        layers += [nn.Linear(wide, width), *((norm, activation) if before_activation else (activation, norm))]
    network = nn.Sequential(*layers, nn.Linear(width, 4))
    x = torch.randn(256, 20)
    for _ in range(60):
        network.train()(x)
    return convert(network.eval(), [x], input_names=["x"], output_names=["y"]).model


def convolutional() -> onnx.ModelProto:
    """Convolutions with BatchNorm behind them: what onnxruntime folds itself."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 3, 20, 20)).astype(np.float32))
    for _ in range(60):
        network.train()(x)
    return convert(network.eval(), [x], input_names=["x"], output_names=["y"]).model


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "credit, the shipped model": credit,
    "dense, before the activation": lambda: dense(before_activation=True),
    "dense, after the activation": lambda: dense(before_activation=False),
    "dense, after the activation, deep": lambda: dense(before_activation=False, depth=8),
    "convolutional": convolutional,
}

if __name__ == "__main__":
    main()
