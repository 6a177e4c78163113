"""The network of a size that people really export: ResNet-50, for the benchmarks of export and of the service.

Architecture: He et al. 2015 (arXiv 1512.03385), stride in the 3 x 3 convolution as in torchvision's. The weights are
drawn, seeded; the running statistics are those of seeded images, so that activations keep their size through all
layers. Nothing is downloaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGE = (3, 224, 224)
_STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, wide: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * _EXPANSION
        self.conv1, self.bn1 = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride > 1 or wide != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        answer: Tensor = (self.bn3(self.conv3(y)) + self.downsample(x)).relu()
        return answer


class ResNet50(nn.Module):
    """`float32[B, 3, H, W]` to logits `float32[B, classes]`."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        wide, stages = 64, []
        for blocks, width, stride in _STAGES:
            for i in range(blocks):
                stages.append(Bottleneck(wide, width, stride if i == 0 else 1))
                wide = width * _EXPANSION
        self.layers = nn.Sequential(*stages)
        self.head = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        answer: Tensor = self.head(self.layers(x).mean((2, 3)))
        return answer


def build(classes: int = 1000) -> ResNet50:
    """The network without its weights, as a user's own callable would make it."""
    return ResNet50(classes)


def images(count: int, seed: int = 1) -> Tensor:
    """Seeded images with a little structure: noise at two scales around a mean that differs by channel."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 14, 14, generator=generator)
    fine = torch.randn(count, *IMAGE, generator=generator)
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    return mean + 0.2 * nn.functional.interpolate(coarse, size=IMAGE[1:], mode="bilinear") + 0.1 * fine


def trained(seed: int = 0) -> ResNet50:
    """The network with drawn weights and with running statistics, in eval mode."""
    torch.manual_seed(seed)
    network = ResNet50()
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out")
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.3, 0.9)
        nn.init.uniform_(norm.bias, -0.2, 0.2)
        norm.momentum = None  # one batch is the whole average
    with torch.no_grad():
        network.train()(images(8, seed=2))
    for norm in norms:
        norm.momentum = 0.1
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(5000)
    return network.eval()
