"""What every test of the training half shares: torch on one thread, and an exporter that is set up once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These networks are so small that a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def operators_are_read_once() -> Iterator[None]:
    """Each export parses the source of the exporter's 500 operators anew: half of its time, and always the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield
