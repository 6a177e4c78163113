"""How many bytes the tensors of an answer will take, before it is computed: guessed by one that was.

An output whose rows have a fixed shape is as large as the rows are many. Of one whose rows vary with what comes,
nothing else is known than how large it was beside what came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from service.runtime import Runtime
from service.signature import Accepted


@final
@dataclass(frozen=True, slots=True)
class AnswerSize:
    """Of one model."""

    row_bytes: float
    """Of the outputs whose rows have a fixed shape."""
    ratio: float
    """Of the others, to the bytes that came."""

    def guess_bytes(self, accepted: Accepted) -> float:
        by_rows = self.row_bytes * accepted.rows
        if not self.ratio:
            return by_rows
        return by_rows + self.ratio * sum([tensor.nbytes for tensor in accepted.tensors])


def measured(runtime: Runtime, sample: Accepted) -> AnswerSize:
    """
    Args:
        sample: is computed once.
    """
    fixed_bytes = varying_bytes = 0
    for spec, output in zip(runtime.outputs, runtime.run(sample.tensors), strict=True):
        if -1 in spec.shape[1:]:
            varying_bytes += output.nbytes
        else:
            fixed_bytes += output.nbytes
    came_bytes = sum([tensor.nbytes for tensor in sample.tensors])
    return AnswerSize(row_bytes=fixed_bytes / sample.rows, ratio=varying_bytes / max(1, came_bytes))
