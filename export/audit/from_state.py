"""The facts in a bare state: what `torch.save(network.state_dict())` keeps.

A layer with running statistics is known by its keys `running_mean`, `running_var` or `num_batches_tracked`. Its eps,
momentum and mode are in the code, not in the state, so they are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from export.audit.facts import Array, Facts, NormFacts

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_WRAPPER = "module."


def read_state(state: Mapping[str, object]) -> Facts:
    """The facts.

    Args:
        state: tensors by key, not changed; whatever is no tensor is passed over.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    layers = dict.fromkeys(key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in _STATISTICS)
    averaged = next((key for key in tensors if key.rpartition(".")[2] == "n_averaged"), "")
    keys = [key for key in tensors if key != averaged]
    return Facts(
        source="state",
        norms=tuple(_norm(layer, tensors) for layer in layers),
        averaged=f"the key '{averaged}'" if averaged else "",
        prefix=_WRAPPER if keys and all(key.startswith(_WRAPPER) for key in keys) and not averaged else "",
    )


def _norm(layer: str, tensors: Mapping[str, Tensor]) -> NormFacts:
    def of(name: str) -> Tensor | None:
        return tensors.get(f"{layer}.{name}" if layer else name)

    mean, var, gamma, beta, count = map(of, ("running_mean", "running_var", "weight", "bias", "num_batches_tracked"))
    stored = mean if var is None else var
    return NormFacts(
        layer=layer,
        kind="BatchNorm",
        mean_C=vector(mean),
        var_C=vector(var),
        gamma_C=vector(gamma),
        beta_C=vector(beta),
        dtype=dtype(stored),
        weights_dtype=dtype(stored if gamma is None else gamma),
        num_batches_tracked=None if count is None or is_empty(count) else int(count),
        tracks=None if mean is not None and var is not None else False,
        lazy=any(value is not None and is_empty(value) for value in (mean, var, gamma, beta)),
    )


def is_empty(tensor: Tensor) -> bool:
    """It has no shape yet (lazy), or no numbers (on the meta device)."""
    return bool(is_lazy(tensor)) or tensor.is_meta


def vector(tensor: Tensor | None) -> Array | None:
    """A copy in float64; None for what is not there or empty."""
    if tensor is None or is_empty(tensor):
        return None
    return np.array(tensor.detach().to("cpu", torch.float64).reshape(-1).numpy())


def dtype(tensor: Tensor | None) -> str:
    """`float32`, `bfloat16`, ..."""
    return "float32" if tensor is None else str(tensor.dtype).removeprefix("torch.")
