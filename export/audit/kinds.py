"""Which torch modules normalise, and with what."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def keeps_statistics(part: nn.Module) -> bool:
    """A layer that normalises with running statistics, or a BatchNorm that should have them."""
    if isinstance(part, _InstanceNorm):
        return part.track_running_stats
    return isinstance(part, _BatchNorm) or is_handmade(part)


def is_handmade(part: nn.Module) -> bool:
    """A layer with running statistics that is none of torch's: FrozenBatchNorm2d and the like."""
    return not isinstance(part, _BatchNorm | _InstanceNorm) and all(
        isinstance(getattr(part, name, None), Tensor) for name in ("running_mean", "running_var")
    )


def is_other_norm(part: nn.Module) -> bool:
    """A layer that normalises with the statistics of the row itself."""
    return isinstance(part, _OTHER_NORMS) or (isinstance(part, _InstanceNorm) and not part.track_running_stats)
