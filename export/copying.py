"""A copy to work on: what is measured, exported or changed is never the user's own object."""

from __future__ import annotations

import copy

from torch import nn

from service.errors import Refused, first_line


def copied(module: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        Refused: something in the network cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever a part of the network raises
        raise Refused(
            f"the network cannot be copied: {first_line(error)}; if it has torch.nn.utils.weight_norm or spectral_norm,"
            " take those of torch.nn.utils.parametrizations, or remove them first"
        ) from error
