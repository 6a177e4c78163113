"""Every batch size that will be used is run before a model is ready, and says how rows may share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from service import rehearsal
from service.admission import Admitted, admit, admit_with
from service.bundle import Bundle
from service.rehearsal import Batching, rehearse
from service.runtime import place
from tests import graphs
from tests.fakes import FakeRuntime


class Rehearsed:
    """A runtime that answers `y = x`, notes its batches, and takes and rounds as told."""

    inputs = FakeRuntime.inputs
    outputs = FakeRuntime.outputs
    provider = "FakeExecutionProvider"
    threads = 1

    def __init__(self, *, row_s: float = 0.0, off_at: int = 0, off_by: float = 2.0**-23) -> None:
        self.sizes: list[int] = []
        self.clock_s = 0.0
        """A clock of its own, which a busy machine does not hurry."""
        self._row_s = row_s
        self._off_at = off_at
        self._off_by = off_by

    def stop(self) -> None:
        pass

    def run(self, tensors: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        size = tensors[0].shape[0]
        self.sizes.append(size)
        self.clock_s += self._row_s * size
        return [tensors[0] * np.float32(1 + self._off_by if size == self._off_at else 1)]


def plain(model: onnx.ModelProto) -> Bundle:
    contents = {"model.onnx": model.SerializeToString()}
    return Bundle(name="m", version="1", folder=Path(), contents=contents, passport=None)


def admitted(runtime: Any, max_batch_rows: int = 16) -> Admitted:
    return admit_with(plain(graphs.batchnorm_model()), lambda _: runtime, max_batch_rows)


def relu(x: Sequence[Any]) -> onnx.ModelProto:
    return graphs.model([onnx.helper.make_node("Relu", ["x"], ["y"])], {}, x=(onnx.TensorProto.FLOAT, x), y=x)


def test_every_size_is_run_before_the_first_caller_comes() -> None:
    runtime = Rehearsed()
    batching = rehearse(admitted(runtime), "exact")
    assert set(runtime.sizes) == set(range(1, 17))
    assert (batching.max_rows, batching.inline_rows, batching.independence.kind) == (16, 16, "exact")
    assert list(batching.run_s) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(("numerics", "together"), [("exact", 1), ("bounded", 16)])
def test_a_size_that_admission_did_not_try_and_that_rounds_otherwise_is_found(numerics: Any, together: int) -> None:
    """`exact` then runs each request alone; `bounded` lets them share, and the figure is published either way."""
    passed = admitted(Rehearsed(off_at=11))
    assert passed.independence.kind == "exact"  # it tried 1, 2, 3, 7 and 16
    batching = rehearse(passed, numerics)
    assert (batching.max_rows, batching.slice_rows) == (together, 16)
    assert batching.independence.kind == "bounded"
    assert batching.independence.bound > 0


@pytest.mark.parametrize("numerics", ["exact", "bounded"])
def test_no_batch_is_as_large_as_one_that_rounding_does_not_explain(numerics: Any) -> None:
    """Whatever may be bounded: a size at which answers are simply others is never used."""
    batching = rehearse(admitted(Rehearsed(off_at=11, off_by=0.5)), numerics)
    assert batching.max_rows == 10
    assert (batching.independence.kind, batching.independence.batch_sizes[-1]) == ("exact", 10)


def test_what_a_row_takes_is_read_off_the_largest_batch() -> None:
    """Where rows may not share a batch that is one row, and where a batch is of a fixed size that one."""
    figure = rehearse(admitted(Rehearsed()), "exact").independence
    for run_s, row_s in (({1: 0.02, 2: 0.021, 16: 0.032}, 0.002), ({1: 0.02}, 0.02), ({4: 0.02}, 0.005)):
        assert Batching(max_rows=16, slice_rows=16, inline_rows=0, run_s=run_s, independence=figure).row_s == row_s


def test_sizes_for_which_there_is_no_time_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LONGEST_REHEARSAL_S", 0.0)
    assert rehearse(admitted(Rehearsed()), "exact").max_rows == 1


def test_who_wants_no_company_has_none() -> None:
    """`--max-batch-rows 1`: every request runs by itself, also where company would change no bit."""
    assert rehearse(admitted(Rehearsed(), max_batch_rows=1), "exact").max_rows == 1


def test_company_must_not_cost_more_than_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No larger batch is made than runs in the time allowed; what is long for the loop gets a thread."""
    monkeypatch.setattr(rehearsal, "LONGEST_RUN_S", 0.015)
    runtime = Rehearsed(row_s=0.0012)
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(perf_counter=lambda: runtime.clock_s))
    batching = rehearse(admitted(runtime), "exact")
    assert batching.max_rows == 8
    assert batching.inline_rows == 1


@pytest.mark.parametrize(
    ("shape", "max_rows", "slice_rows", "inline"),
    [([4, 3], 1, 4, 4), (["batch", "time"], 1, 16, 0), ([1, "time"], 1, 1, 0), (["batch", 3], 16, 16, 16)],
    ids=[
        "a fixed batch runs as it is",
        "rows of any length run alone, in a thread",
        "also where the batch is fixed",
        "rows of one shape run together",
    ],
)
def test_what_may_run_together(shape: Sequence[Any], max_rows: int, slice_rows: int, inline: int) -> None:
    batching = rehearse(admit(plain(relu(shape)), place("cpu"), threads=1, max_batch_rows=16), "exact")
    assert (batching.max_rows, batching.inline_rows) == (max_rows, inline)
    assert batching.slice_rows == slice_rows or (batching.slice_rows > slice_rows == 16 and max_rows == 16)


def test_a_large_request_runs_in_slices_that_are_long_enough_and_not_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a tiny network is not worth a turn of its own, nor 64 of them; where rows round in company it is as many
    as that was shown for."""
    for row_s, off_at, slice_rows in ((1e-4, 0, 128), (0.0, 0, 2**16), (0.005, 0, 16), (1e-4, 11, 16)):
        runtime = Rehearsed(row_s=row_s, off_at=off_at)
        monkeypatch.setattr(rehearsal, "time", SimpleNamespace(perf_counter=lambda r=runtime: r.clock_s))
        assert rehearse(admitted(runtime), "exact").slice_rows == slice_rows
