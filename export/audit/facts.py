"""What an audit knows of a network, whatever it was read from: values, no torch, no ONNX.

1. What a source cannot say is None or empty, never a guess: a bare state has no eps, an ONNX file no counter. A rule
   that has to assume something says so in its sentence.
2. Vectors are float64 and hold what is stored, exactly; `dtype` says in what it was stored.
3. `momentum` is PyTorch's, the weight of the new batch; what ONNX and Keras call so is 1 minus that.

Shapes: C channels; N rows of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Momentum = float | Literal["cumulative"] | None
"""The weight of the new batch; 'cumulative' is the plain average of all batches (PyTorch's None); None is unknown."""

USUAL_MOMENTUM = 0.1
"""PyTorch's default: what is assumed where a source does not say."""
USUAL_EPS = 1e-5
"""PyTorch's and ONNX's default."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormFacts:
    """A layer with running statistics, or one that should have them."""

    layer: str
    kind: str
    mean_C: Array | None = None
    var_C: Array | None = None
    gamma_C: Array | None = None
    beta_C: Array | None = None
    dtype: str = "float32"
    """In which the running statistics are stored."""
    weights_dtype: str = "float32"
    """In which the layer computes: gamma's, or that of its input."""
    eps: float | None = None
    momentum: Momentum = None
    num_batches_tracked: int | None = None
    training: bool | None = None
    tracks: bool | None = None
    """track_running_stats."""
    computed: tuple[str, ...] = ()
    """ONNX: which of the two running statistics the graph computes, where it should hold them."""
    affine_frozen: bool = False
    """gamma and beta are not trained (requires_grad=False)."""
    synced: bool = False
    """Statistics are shared between processes (SyncBatchNorm)."""
    lazy: bool = False
    """It has no shape or no numbers yet."""
    handmade: bool = False
    """It has running statistics, but is not the framework's own layer."""
    quantised: Literal["", "live", "kept"] = ""
    """'live': trained for quantisation, with statistics that still move; 'kept': in float between quantised ones."""

    @property
    def channels(self) -> int:
        return next((v.size for v in (self.var_C, self.mean_C, self.gamma_C, self.beta_C) if v is not None), 0)

    @property
    def initial(self) -> bool:
        """Mean 0 and variance 1 in every channel: what a new layer holds, and no data gives."""
        if self.mean_C is None or self.var_C is None or not self.mean_C.size:
            return False
        return not self.mean_C.any() and bool((self.var_C == 1).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutBefore:
    """A Dropout whose output reaches a norm layer."""

    dropout: str
    norm: str
    p: float | None
    between: tuple[str, ...]
    """The weighted layers on the way, by kind; empty: it stands directly before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveDropout:
    """A Dropout that drops although the network is in eval mode."""

    layer: str
    p: float | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A decision in the network's code that looks at the number of rows."""

    layer: str
    where: str
    """Class, function and line inside the class: `Tab.forward, line 7`."""
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesLast:
    """A norm layer that takes axis 1 for the channels of a tensor whose features are on its last axis."""

    layer: str
    producer: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What a layer was given by the sample, with all layers before it in eval mode."""

    layer: str
    rows: int
    values_per_row: int
    """In each channel: 1 for a table, the positions of an image."""
    mean_C: Array
    var_C: Array
    mean_error_C: Array
    """The standard error of `mean_C`: rows are independent, the positions of a row are not."""
    var_error_C: Array
    raw: bool = False
    """The layer takes an input of the network as it comes."""
    padded_share: float = 0.0
    """How much of a sequence is trailing zeros, where their number differs between rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """How the answer for a row changes with the rows beside it, in eval mode."""

    rows: int
    """In how large a batch the difference is largest, against the row alone; 0: it is in every batch the same."""
    difference: float = 0.0
    largest: float = 0.0
    """The largest output, to hold the difference against."""
    neighbours: bool = False
    """The contents of the other rows matter, not only their number."""
    failure: str = ""
    """What the network raised for some number of rows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """What running a sample showed."""

    seen: tuple[Seen, ...]
    """In the order in which the layers ran."""
    company: Company


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Facts:
    """A network, as far as its BatchNorm is concerned."""

    source: Literal["module", "state", "onnx"]
    norms: tuple[NormFacts, ...]
    root_training: bool = False
    training: tuple[tuple[str, str], ...] = ()
    """Path and kind of every module in training mode whose mode matters."""
    live_dropouts: tuple[LiveDropout, ...] = ()
    dropouts_before: tuple[DropoutBefore, ...] = ()
    averaged: str = ""
    """What says that the weights are an average of several; empty: nothing."""
    other_norms: Mapping[str, int] = field(default_factory=dict)
    """Norm layers without running statistics, by kind."""
    trainable: bool = False
    """Some parameter is trained."""
    branches: tuple[Branch, ...] = ()
    features_last: tuple[FeaturesLast, ...] = ()
    folded: tuple[tuple[str, str], ...] = ()
    """Node and rewrite rule of every BatchNorm that an exporter says it folded away."""
    prefix: str = ""
    """What wraps every key of a state: 'module.'."""
    opset: int | None = None
    observed: Observed | None = None
    steps: int | None = None
    """Optimizer steps of the training."""
    training_rows: int | None = None
    batch_size: int | None = None
    settled: frozenset[str] = frozenset()
    """Layers whose statistics were measured exactly, not averaged while the network learned."""
    reference: tuple[NormFacts, ...] | None = None
    """The layers of another state of the same network: a pretrained checkpoint, another process's."""

    def norm(self, layer: str) -> NormFacts | None:
        """The layer of that name."""
        return next((norm for norm in self.norms if norm.layer == layer), None)

    @property
    def measured(self) -> tuple[NormFacts, ...]:
        """The layers that have both running statistics."""
        return tuple(norm for norm in self.norms if norm.mean_C is not None and norm.var_C is not None)


def canonical(layer: str) -> str:
    """A layer's name without what wrappers put before it, so that two states of one network can be held together."""
    for wrapper in ("module.", "_orig_mod."):
        layer = layer.removeprefix(wrapper)
    return layer
