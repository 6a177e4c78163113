"""Networks in which every term of BatchNorm matters, with the rows to run them on.

Statistics are near those of the rows but not equal to them, eps is 0.6 of the variance, gamma lies in 1.5 to 2.5, beta
around 1: whoever ignores or swaps one of them is far off, and so is train mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.modules.batchnorm import _BatchNorm

from export.conversion import Converted, convert


def settled(network: nn.Module, *inputs: Tensor, seed: int = 7) -> nn.Module:
    """The network in eval mode, its BatchNorm layers as if trained on rows much like these."""
    generator = torch.Generator().manual_seed(seed)

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        values = args[0].transpose(0, 1).flatten(1)
        var_C, mean_C = torch.var_mean(values, 1)
        norm.running_mean.copy_(mean_C + 0.5 * var_C.sqrt())
        norm.running_var.copy_(1.5 * var_C + 1e-12)
        norm.eps = 0.6 * float(var_C.mean())
        if norm.affine:
            norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 1.5)
            norm.bias.copy_(torch.randn(norm.num_features, generator=generator) + 1)

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) - 0.5) * 2 * parameter.shape[-1] ** -0.5)
        hooks = [part.register_forward_pre_hook(settle) for part in network.modules() if isinstance(part, _BatchNorm)]
        network.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return network


def rows(*shape: int, mean: float = 3.0, std: float = 0.22, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std + mean


def dense(*, before_activation: bool, width: int = 16, depth: int = 2) -> nn.Module:
    """BatchNorm over 5 raw features, then blocks with BatchNorm on either side of the activation; 3 probabilities."""
    layers: list[nn.Module] = [nn.BatchNorm1d(5, affine=False)]
    for wide in [5, *[width] * (depth - 1)]:
        norm, activation = nn.BatchNorm1d(width), nn.ReLU()
        layers += [nn.Linear(wide, width), *((norm, activation) if before_activation else (activation, norm))]
        layers += [nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(width, 3), nn.Softmax(1))


class Residual(nn.Module):
    """Two convolutions beside a shortcut, with functional activations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.m, self.n = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return relu(x + self.n(self.b(relu(self.m(self.a(x))))))


class Tabular(nn.Module):
    """Two inputs and two outputs, embeddings, and a BatchNorm that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(4, 3), nn.Embedding(6, 2)])
        self.standardise = nn.BatchNorm1d(3, affine=False)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.alias = self.norm
        self.head = nn.Linear(8, 2)

    def forward(self, continuous: Tensor, categorical: Tensor) -> dict[str, Tensor]:
        embedded = [embedding(categorical[:, i]) for i, embedding in enumerate(self.embeddings)]
        x = torch.cat([*embedded, self.standardise(continuous)], 1)
        hidden = self.alias(self.mix(self.norm(self.mix(x)).relu()))
        return {"hidden": hidden, "value": self.head(hidden)}


def tabular_inputs() -> tuple[Tensor, Tensor]:
    categories = torch.stack([torch.arange(9) % 4, torch.arange(9) % 6], 1)
    return rows(9, 3), categories


def convolutional(*, before_activation: bool) -> nn.Module:
    norm, activation = nn.BatchNorm2d(6), nn.ReLU()
    first = (norm, activation) if before_activation else (activation, norm)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), *first, nn.MaxPool2d(2), nn.Conv2d(6, 7, 2), nn.BatchNorm2d(7), nn.Flatten(),
        nn.Linear(42, 4),
    )  # fmt: skip


Case = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


def _case(make: Callable[[], nn.Module], *inputs: Tensor) -> Case:
    return lambda: (settled(make(), *inputs), inputs)


IMAGES = rows(10, 3, 8, 7)

ZOO: dict[str, Case] = {
    "dense, before the activation": _case(lambda: dense(before_activation=True), rows(64, 5)),
    "dense, after the activation": _case(lambda: dense(before_activation=False), rows(64, 5)),
    "dense, wide": _case(lambda: dense(before_activation=True, width=512), rows(16, 5)),
    "dense, deep": _case(lambda: dense(before_activation=False, depth=10), rows(16, 5)),
    "dense, |mean| = 10,000 std": _case(lambda: dense(before_activation=True), rows(64, 5, mean=100.0, std=0.01)),
    "dense, large values": _case(lambda: dense(before_activation=False), rows(64, 5) * 1e6),
    "dense, tiny values": _case(lambda: dense(before_activation=True), rows(64, 5) * 1e-6),
    "convolutional, before the activation": _case(lambda: convolutional(before_activation=True), IMAGES),
    "convolutional, after the activation": _case(lambda: convolutional(before_activation=False), IMAGES),
    "residual": _case(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), Residual(6), Residual(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        IMAGES,
    ),
    "depthwise": _case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6),
            nn.Hardswish(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3), nn.LogSoftmax(1),
        ),
        IMAGES,
    ),
    "transposed": _case(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.GELU(),
            nn.ConvTranspose2d(6, 2, 4, groups=2), nn.Tanh(),
        ),
        IMAGES,
    ),
    "one and three axes": _case(
        lambda: nn.Sequential(
            nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6), nn.Flatten(2), nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5), nn.ELU(),
            nn.Flatten(), nn.Linear(140, 3),
        ),
        rows(9, 3, 3, 4, 6),
    ),
    "attention": _case(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Flatten(), nn.BatchNorm1d(40), nn.Linear(40, 3)
        ),
        rows(12, 5, 8),
    ),
    "other norms": _case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 2), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.BatchNorm2d(6),
            nn.LayerNorm([6, 7, 6]), nn.Flatten(), nn.Linear(252, 2), nn.Sigmoid(),
        ),
        IMAGES,
    ),
}  # fmt: skip


@functools.cache
def converted(name: str) -> Converted:
    """A network of the zoo as ONNX, with the tensors `x` and `y`; the same each time, so made once for all tests."""
    network, inputs = ZOO[name]()
    return convert(network, inputs, input_names=["x"], output_names=["y"])
