"""Stand-ins for the engine, complete and as hurtful as the real one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from service.signature import TensorSpec

STUCK_LIMIT_S = 10.0


@final
class FakeRuntime:
    """Answers `y = 2 x` for x: float32[batch, 3]; notes each batch; can be slow, be stopped and choke on a value.

    It sleeps without giving way, as a real session computes, so a call on the event loop is felt.
    """

    inputs = (TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),)
    outputs = (TensorSpec(name="y", datatype="FP32", shape=(-1, 3)),)
    provider = "FakeExecutionProvider"
    threads = 1

    def __init__(self, *, run_s: float = 0.0, chokes_on: float | None = None) -> None:
        self.batches: list[int] = []
        self.ran_on: set[int] = set()
        self.started = threading.Event()
        """Set when the first batch has begun."""
        self.comes_back = threading.Event()
        """Clear it, and no run ends until it is set again, or what waits for that has to be let go of."""
        self.comes_back.set()
        self.run_s = run_s
        self._chokes_on = chokes_on
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        (x,) = tensors
        self._stop.clear()
        self.batches.append(x.shape[0])
        self.started.set()
        self.ran_on.add(threading.get_ident())
        if self._stop.wait(self.run_s):
            raise RuntimeError("stopped")
        self.comes_back.wait(STUCK_LIMIT_S)
        if self._chokes_on is not None and (x == self._chokes_on).any():
            raise RuntimeError(f"cannot compute {self._chokes_on}")
        return [x * np.float32(2)]
