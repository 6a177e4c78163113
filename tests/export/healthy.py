"""Networks that are well: small, of every usual make, really trained, and then put in eval mode.

Each has learned something from seeded data for `STEPS` steps with momentum 0.1, so its running statistics are those of
its data as far as a moving average of batches can know them. Whatever is said against them is a false alarm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from export.conversion import Converted, convert

STEPS = 120
BATCH = 24
ROWS = 240
"""Five batches a pass are ten here: every row is seen twelve times."""
SAMPLE = 96
"""Rows of the sample that a network comes with."""

Made = tuple[nn.Module, tuple[Tensor, ...]]


def _images(*shape: int, seed: int = 3) -> Tensor:
    """Values with a mean and a spread of their own in each channel."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(1, shape[1], *[1] * (len(shape) - 2), generator=generator)
    offset = torch.randn(1, shape[1], *[1] * (len(shape) - 2), generator=generator)
    rough = torch.randn(shape, generator=generator)
    row = torch.randn(shape[0], shape[1], *[1] * (len(shape) - 2), generator=generator)
    return (rough + 0.5 * row) * scale + offset


class _Block(nn.Module):
    """The block of a residual network."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class _Dense(nn.Module):
    """The layer of a densely connected network: BatchNorm first, and the input beside the output."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(relu(self.norm(x)))], 1)


class _Tabular(nn.Module):
    """Embeddings beside numbers that its first BatchNorm standardises."""

    def __init__(self) -> None:
        super().__init__()
        self.standardise = nn.BatchNorm1d(4, affine=False)
        self.embeddings = nn.ModuleList([nn.Embedding(5, 3), nn.Embedding(7, 4)])
        self.body = nn.Sequential(nn.Linear(11, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(24, 2)

    def forward(self, continuous: Tensor, categorical: Tensor) -> Tensor:
        embedded = [embedding(categorical[:, i]) for i, embedding in enumerate(self.embeddings)]
        if self.training and len(embedded) < 2:  # a list's length, and no number of rows
            raise ValueError("two categories are wanted")
        return torch.as_tensor(self.head(self.body(torch.cat([self.standardise(continuous), *embedded], 1))))


def _separable(channels: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(),
        nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6(),
    ]  # fmt: skip


def _mlp() -> Made:
    network = nn.Sequential(
        nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(20, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3),
    )  # fmt: skip
    return network, (_images(ROWS, 6),)


def _vgg() -> Made:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3),
    )  # fmt: skip
    return network, (_images(ROWS, 3, 8, 8),)


def _resnet() -> Made:
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), _Block(6, 12, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    return network, (_images(ROWS, 3, 7, 6),)


def _mobilenet() -> Made:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), *_separable(8, 14),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(14, 3),
    )  # fmt: skip
    return network, (_images(ROWS, 3, 9, 8),)


def _densenet() -> Made:
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), _Dense(6, 4), _Dense(10, 4), nn.BatchNorm2d(14), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(126, 3),
    )  # fmt: skip
    return network, (_images(ROWS, 3, 7, 6),)


def _conv1d() -> Made:
    network = nn.Sequential(
        nn.Conv1d(4, 10, 5, padding=2), nn.BatchNorm1d(10), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(10, 12, 3), nn.BatchNorm1d(12), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    return network, (_images(ROWS, 4, 20),)


def _conv3d() -> Made:
    network = nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(6, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return network, (_images(ROWS, 2, 4, 5, 6),)


def _decoder() -> Made:
    network = nn.Sequential(
        nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2)),
        nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(192, 3),
    )  # fmt: skip
    return network, (_images(ROWS, 6),)


def _tabular() -> Made:
    generator = torch.Generator().manual_seed(8)
    unit = torch.tensor([1.0, 300.0, 0.02, 20.0])
    categories = torch.stack([torch.randint(5, (ROWS,), generator=generator) for _ in range(2)], 1)
    return _Tabular(), (_images(ROWS, 4) * unit + 5 * unit, categories)


_MADE: dict[str, Callable[[], Made]] = {
    "mlp": _mlp,
    "vgg": _vgg,
    "resnet": _resnet,
    "mobilenet": _mobilenet,
    "densenet": _densenet,
    "conv1d": _conv1d,
    "conv3d": _conv3d,
    "decoder": _decoder,
    "tabular": _tabular,
}


def train(network: nn.Module, inputs: tuple[Tensor, ...], *, steps: int = STEPS, seed: int = 5) -> nn.Module:
    """Learn three classes that a linear function of the first input decides; the network is left in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    flat = inputs[0].flatten(1)
    flat = (flat - flat.mean(0)) / flat.std(0)
    labels = (flat @ torch.randn(flat.shape[1], 2, generator=generator)).argmax(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, fused=True)
    network.train()
    for _ in range(steps):
        pick = torch.randperm(len(labels), generator=generator)[:BATCH]
        optimizer.zero_grad()
        cross_entropy(network(*(tensor[pick] for tensor in inputs)), labels[pick]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights and dropout are drawn from this seed, and the tests around draw what they would have drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@functools.cache
def _trained(name: str) -> Made:
    with _seeded(11):
        network, inputs = _MADE[name]()
        train(network, inputs)
    return network, tuple(tensor[:SAMPLE] for tensor in inputs)


HEALTHY: dict[str, Callable[[], Made]] = {name: functools.partial(_trained, name) for name in _MADE}
"""A network in eval mode and rows for it, always the same objects: change a copy."""


@functools.cache
def converted(name: str) -> Converted:
    """A healthy network as ONNX."""
    network, inputs = HEALTHY[name]()
    names = [f"x{i}" for i in range(len(inputs))]
    return convert(network, inputs, input_names=names, output_names=["y"])
