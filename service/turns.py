"""Whoever changes what is served waits for as few others as can be.

Rule 1: one version at a time is admitted: an admission may take most of the memory that is free, and all CPUs.
Rule 2: the changes of one model take turns, so that what was asked for last is what holds.
Rule 3: what is done at once waits for nothing that takes long: an alias for no admission at all, an unload only for one
    of the same model, which would undo it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import final
from weakref import WeakValueDictionary


@final
class Turns:
    """Of those who change what is served."""

    def __init__(self) -> None:
        self.loading = asyncio.Lock()
        """Held while versions are admitted, or a process loads what the others serve."""
        self.changing = asyncio.Lock()
        """Held for a moment, while what is served changes; after the others."""
        self._models: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def load(self, model: str) -> AsyncIterator[None]:
        async with self.loading, self._of(model):
            yield

    @asynccontextmanager
    async def unload(self, model: str) -> AsyncIterator[None]:
        async with self._of(model), self.changing:
            yield

    def _of(self, model: str) -> asyncio.Lock:
        return self._models.setdefault(model, asyncio.Lock())
