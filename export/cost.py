"""How many rows a check may take: a budget of multiplications, so that a large network costs minutes and not hours.

Counted, not timed: the same network on the same rows is checked with the same rows on any machine, and the bundle that
comes out has the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from service.errors import Refused, first_line

MOST_ROWS = 64

SAMPLE_FLOPS = 6.6e10
"""For the rows that are golden samples and one batch of parity: 8 images for a ResNet-50 (8.2e9 each)."""

ANALYSED_FLOPS = 2.5e10
"""For the rows of the audit, the float error analysis and the small batches of parity: 3 images for a ResNet-50."""

BATCH_FLOPS = 6.6e10
"""For the largest batch that independence is tried at: 8 images for a ResNet-50."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Rows for each kind of check; at least 3, so that batches of 1, 2 and 3 are different."""

    sample: int
    analysed: int
    batch: int

    @property
    def trials_per_axis(self) -> int:
        """Runs of the float error analysis, each of which moves every element of every row: 1 will do for images."""
        return 3 if self.analysed == MOST_ROWS else 1


def budget(module: nn.Module, inputs: Sequence[Tensor]) -> Budget:
    """What a network's checks may cost.

    Args:
        module: in eval mode; not changed.
        inputs: rows for each argument of `forward`; the first two are run once.

    Raises:
        Refused: the network fails on two rows.
    """
    rows = min(2, len(inputs[0]))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*(tensor[:rows] for tensor in inputs))
    except Exception as error:  # the network's own code may raise anything
        raise Refused(
            f"the network fails on a batch of {rows}, and it must take any number of rows: {first_line(error)}"
        ) from error
    flops_per_row = max(counter.get_total_flops() / rows, 1.0)

    def affordable(flops: float) -> int:
        return int(min(max(flops / flops_per_row, 3), MOST_ROWS))

    return Budget(sample=affordable(SAMPLE_FLOPS), analysed=affordable(ANALYSED_FLOPS), batch=affordable(BATCH_FLOPS))
