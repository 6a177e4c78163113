"""The reference networks: `TabularNet` for tables, `ConvNet` for images; both with BatchNorm where it is asked for.

1. A network takes raw values. What standardises them is its first BatchNorm, and a regression's unit is in its buffers,
   so nothing has to be done to a sample outside the graph.
2. A configuration is a frozen value that JSON can hold, and all it takes to build the network again.
3. A network gives logits, on which a loss is computed; `Served` gives what a caller wants: probabilities, or the value.

Shapes: B rows, N continuous features, M categorical features, K classes; C channels of H x W.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated, Literal, Self, final

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from export.options import Norm

Size = Annotated[int, Field(ge=1)]

EMBEDDING_STD = 0.1
"""How far apart categories are before anything is learned. PyTorch draws them with 1, as large as the standardised
numbers beside them, and what is drawn drowns what few rows teach. Chosen by cross-validation on the credit table."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    norm: Norm = "before"
    norm_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """PyTorch's convention: the weight of the new batch."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5


class TabularNetConfig(_Config):
    """A network for tables."""

    kind: Literal["tabular"] = "tabular"
    n_continuous: Annotated[int, Field(ge=0)]
    cardinalities: tuple[Annotated[int, Field(ge=2)], ...]
    """For each categorical feature the number of its indices: its categories, and index 0 for 'missing'."""
    embedding_sizes: tuple[Size, ...]
    """For each categorical feature; `embedding_size` is the rule of thumb."""
    outputs: Size
    """The number of classes; 1 for a number."""
    target: Literal["classes", "number"] = "classes"
    hidden: tuple[Size, ...] = (32, 16)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    standardise_eps: Annotated[float, Field(gt=0)] = 1e-5

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if len(self.embedding_sizes) != len(self.cardinalities):
            raise ValueError(
                f"{len(self.cardinalities)} cardinalities, but {len(self.embedding_sizes)} embedding sizes"
            )
        if self.n_continuous + len(self.cardinalities) == 0:
            raise ValueError("a network needs at least one feature")
        if self.target == "classes" and self.outputs < 2:
            raise ValueError("two classes are two outputs, also where the answer is yes or no")
        if self.target == "number" and self.outputs != 1:
            raise ValueError("a number is one output")
        return self


class ConvNetConfig(_Config):
    """A network for images."""

    kind: Literal["convolutional"] = "convolutional"
    channels: Size
    widths: tuple[Size, ...] = (8, 16)
    """Channels after each block; between blocks the image is halved."""
    outputs: Annotated[int, Field(ge=2)]


def embedding_size(cardinality: int) -> int:
    """How many numbers stand for a category: fastai's rule, 1.6 n^0.56, and at most 50.

    >>> [embedding_size(cardinality) for cardinality in (2, 5, 11, 1000, 100_000)]
    [2, 4, 6, 50, 50]
    """
    return min(50, round(1.6 * math.pow(cardinality, 0.56)))


@final
class TabularNet(nn.Module):
    """Embeddings beside standardised numbers, blocks of Linear, BatchNorm, ReLU and Dropout, and a Linear at the end.

    `standardise` is a BatchNorm without gamma and beta over the raw continuous features. Its running statistics are to
    be those of all training rows: call `measure` with them, and keep the layer in eval mode while the others train.
    """

    def __init__(self, config: TabularNetConfig) -> None:
        super().__init__()
        self.config = config
        n = config.n_continuous
        # The cumulative average of one batch, all training rows, is exactly their statistics: see `measure`.
        self.standardise = nn.BatchNorm1d(n, eps=config.standardise_eps, momentum=None, affine=False) if n else None
        self.embeddings = nn.ModuleList(
            nn.Embedding(cardinality, size)
            for cardinality, size in zip(config.cardinalities, config.embedding_sizes, strict=True)
        )
        for weight in self.embeddings.parameters():
            nn.init.normal_(weight, std=EMBEDDING_STD)
        widths = [n + sum(config.embedding_sizes), *config.hidden]
        self.blocks = nn.Sequential(
            *(_dense(wide, narrow, config) for wide, narrow in zip(widths, config.hidden, strict=False))
        )
        self.head = nn.Linear(widths[-1], config.outputs)
        if config.target == "number":
            self.register_buffer("target_mean", torch.zeros(()))
            self.register_buffer("target_scale", torch.ones(()))

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Answer rows.

        Args:
            first: `continuous: float32[B, N]`, raw; `categorical` in its place where there are no continuous features.
            second: `categorical: int64[B, M]`, where index 0 is 'missing'; nothing where there are none.

        Returns:
            Logits [B, K], or [B, 1] in the target's own unit.
        """
        scores_BK = self.scores(first, second)
        if self.config.target == "classes":
            return scores_BK
        return scores_BK * self.get_buffer("target_scale") + self.get_buffer("target_mean")

    def scores(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Like `forward`, with a number in standard deviations from the training mean: the scale of the loss."""
        parts: list[Tensor] = []
        categorical_BM: Tensor | None = first
        if self.standardise is not None:
            parts.append(self.standardise(first))
            categorical_BM = second
        if self.embeddings:
            assert categorical_BM is not None, "this network takes categorical features"
            parts.extend(embedding(categorical_BM[:, m]) for m, embedding in enumerate(self.embeddings))
        scores_BK: Tensor = self.head(self.blocks(torch.cat(parts, dim=1)))
        return scores_BK

    @torch.no_grad()
    def measure(self, continuous_BN: Tensor) -> None:
        """Set the statistics of `standardise` to those of these rows: one batch, as a cumulative average takes it.

        The sums are in float64, because the squares of raw values do not fit the digits of float32.

        Args:
            continuous_BN: all training rows, at least two; not changed.
        """
        assert self.standardise is not None
        norm, rows_BN = self.standardise, continuous_BN.double()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.running_mean.copy_(rows_BN.mean(dim=0))
        norm.running_var.copy_(rows_BN.var(dim=0, correction=1))
        norm.num_batches_tracked.fill_(1)

    @torch.no_grad()
    def set_unit(self, *, mean: float, scale: float) -> None:
        """Set what a number's scores are multiplied by and counted from."""
        self.get_buffer("target_mean").fill_(mean)
        self.get_buffer("target_scale").fill_(scale)


@final
class ConvNet(nn.Module):
    """Blocks of convolution, BatchNorm and ReLU, each at half the resolution of the one before; the mean; a Linear.

    Takes `float32[B, C, H, W]` of any height and width from 2^(blocks - 1) on; gives logits [B, K].
    """

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels, *config.widths]
        self.blocks = nn.ModuleList(
            _convolution(wide, narrow, config) for wide, narrow in zip(widths, config.widths, strict=False)
        )
        self.head = nn.Linear(widths[-1], config.outputs)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            images_BCHW = block(nn.functional.max_pool2d(images_BCHW, 2) if i else images_BCHW)
        scores_BK: Tensor = self.head(images_BCHW.mean(dim=(2, 3)))
        return scores_BK


@final
class Served(nn.Module):
    """A network as it is served: `probabilities` that sum to 1, or the `value`; the arguments are the network's."""

    def __init__(self, network: TabularNet | ConvNet) -> None:
        super().__init__()
        self.network = network
        self._number = isinstance(network.config, TabularNetConfig) and network.config.target == "number"
        self.output_names = ("value",) if self._number else ("probabilities",)

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        answer_BK: Tensor = self.network(first) if second is None else self.network(first, second)
        return answer_BK if self._number else answer_BK.softmax(dim=1)


def _dense(wide: int, narrow: int, config: TabularNetConfig) -> nn.Sequential:
    # A bias in front of a BatchNorm is subtracted again with the mean.
    linear = nn.Linear(wide, narrow, bias=config.norm != "before")
    norm = nn.BatchNorm1d(narrow, eps=config.norm_eps, momentum=config.norm_momentum)
    return _block(config.norm, linear, norm, nn.Dropout(config.dropout))


def _convolution(wide: int, narrow: int, config: ConvNetConfig) -> nn.Sequential:
    convolution = nn.Conv2d(wide, narrow, kernel_size=3, padding=1, bias=config.norm != "before")
    return _block(config.norm, convolution, nn.BatchNorm2d(narrow, eps=config.norm_eps, momentum=config.norm_momentum))


def _block(place: Norm, linear: nn.Module, norm: nn.Module, dropout: nn.Module | None = None) -> nn.Sequential:
    """The layers of a block in their order, by name; Dropout comes last, so that no BatchNorm follows it directly."""
    activation = nn.ReLU()
    layers: dict[Norm, list[tuple[str, nn.Module]]] = {
        "before": [("linear", linear), ("norm", norm), ("activation", activation)],
        "after": [("linear", linear), ("activation", activation), ("norm", norm)],
        "none": [("linear", linear), ("activation", activation)],
    }
    return nn.Sequential(OrderedDict([*layers[place], *([("dropout", dropout)] if dropout is not None else [])]))
