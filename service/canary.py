"""Whether a model still answers: asked of the engine itself, with a sample, and not of the process around it.

Rule 1: a model that ran lately is not asked; an idle service to which nobody puts the question does nothing.
Rule 2: the sample goes the way of every request, so it finds out about whatever holds those up; but no statistics know
        of it, because nobody asked for its answer.
Rule 3: one sample at a time; while it is on its way, whoever asks waits a moment, and is told yes until the model is
        overdue. A long run is not a stuck one.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import perf_counter_ns
from typing import final

from service.coalescing import Coalescer, Computed
from service.errors import DeadlineExceeded, NotReady, QueueFull, first_line
from service.signature import Accepted

LATELY_S = 5.0

OVERDUE_S = 2.0
"""An answer that is not there after so long is overdue; of a model that takes long by itself, after twenty runs."""

MOMENT_S = 0.5
"""Shorter than what orchestrators wait for the answer of a probe, which is a second."""


@final
class Canary:
    """Of one model."""

    def __init__(self, coalescer: Coalescer, sample: Accepted, *, run_s: float) -> None:
        """
        Args:
            sample: one that the model was admitted with.
            run_s: how long a run of it took then.
        """
        self._coalescer = coalescer
        self._sample = sample
        self._overdue_s = max(OVERDUE_S, 20 * run_s)
        self._since_ns: int | None = None
        """Since when there is no answer; None: nothing is missing."""
        self._on_its_way = False
        self._told = asyncio.Event()
        self._error: Exception | None = None
        self._failed_ns: int | None = None
        """When somebody who asked was last told no."""

    async def check(self) -> None:
        """
        Raises:
            NotReady: the model does not answer, or cannot compute what it was admitted with.
        """
        try:
            await self._check()
        except NotReady:
            self._failed_ns = perf_counter_ns()
            raise
        self._failed_ns = None

    @property
    def answers(self) -> bool:
        """As far as is known: whoever asked last was told yes, or it has answered somebody since."""
        return self._failed_ns is None or self._coalescer.ran_ns > self._failed_ns

    async def _check(self) -> None:
        now_ns = perf_counter_ns()
        if now_ns - self._coalescer.ran_ns < LATELY_S * 1e9:
            self._since_ns = None
            return
        if self._since_ns is None or self._since_ns < self._coalescer.ran_ns:
            self._since_ns = now_ns
        since_ns = self._since_ns
        self._send()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), MOMENT_S)
            if self._error is not None:
                raise NotReady(f"the model fails on a sample that it was admitted with: {first_line(self._error)}")
            return
        waited_s = (perf_counter_ns() - since_ns) / 1e9
        if waited_s > self._overdue_s:
            raise NotReady(f"the model has not answered a sample for {waited_s:.0f} s")

    def _send(self) -> None:
        if self._on_its_way:
            return
        self._told.clear()
        self._on_its_way = True
        until_ns = perf_counter_ns() + int(self._overdue_s * 1e9)  # so that nobody waits for a run that is stuck
        try:
            self._coalescer.submit(self._sample, self._tell, expires_ns=until_ns, counted=False)
        except QueueFull:  # and nothing ran lately
            self._on_its_way = False

    def _tell(self, computed: Computed) -> None:
        if isinstance(computed.error, DeadlineExceeded):
            self._on_its_way = False
            return
        self._error = computed.error
        self._since_ns = None
        self._on_its_way = False
        self._told.set()
