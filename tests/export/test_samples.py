"""Rows out of a `.npz` file: named for the arguments or in order, finite, and as many in each array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.samples import read
from service.errors import WrongCall

X = np.arange(12, dtype=np.float32).reshape(4, 3)
MASK = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor | None = None) -> Tensor:
        answer: Tensor = self.linear(x) * mask
        return answer if scale is None else answer * scale


class AnyNumber(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0]


def saved(folder: Path, *unnamed: Any, **named: Any) -> Path:
    np.savez(folder / "rows.npz", *unnamed, **named)
    return folder / "rows.npz"


def test_named_arrays_come_in_the_arguments_order(tmp_path: Path) -> None:
    found = read(saved(tmp_path, mask=MASK, x=X), Two())
    assert found.names == ("x", "mask")
    assert torch.equal(found.inputs[0], torch.from_numpy(X))
    assert found.inputs[1].dtype == torch.int64
    assert len(found) == 4


def test_unnamed_arrays_are_taken_in_order(tmp_path: Path) -> None:
    assert read(saved(tmp_path, X, MASK), Two()).names == ("x", "mask")
    assert read(saved(tmp_path, X, MASK), AnyNumber()).names == ("input_0", "input_1")


def test_one_array_for_one_argument_may_be_called_anything(tmp_path: Path) -> None:
    """nn.Sequential calls its argument `input`, and nobody knows."""
    assert read(saved(tmp_path, images=X), nn.Sequential(nn.Linear(3, 2))).names == ("input",)


def test_floats_come_in_the_dtype_of_the_weights(tmp_path: Path) -> None:
    """NumPy's default is float64, and the network's seldom is; it is said."""
    file = saved(tmp_path, x=X.astype(np.float64), mask=MASK)
    found = read(file, Two())
    assert found.inputs[0].dtype == torch.float32
    assert found.notes == ("'x' is float64; given to the network as float32",)
    assert read(file, Two().half()).inputs[0].dtype == torch.float16


@pytest.mark.parametrize("dtype", [">f4", np.longdouble, ">f8"])
def test_any_byte_order_and_width(dtype: Any, tmp_path: Path) -> None:
    """As other machines and other programs write them."""
    found = read(saved(tmp_path, x=X.astype(dtype), mask=MASK.astype(">u4")), Two())
    assert torch.equal(found.inputs[0], torch.from_numpy(X))
    assert torch.equal(found.inputs[1], torch.from_numpy(MASK))


def test_a_damaged_archive(tmp_path: Path) -> None:
    file = tmp_path / "rows.npz"
    np.savez_compressed(file, x=np.random.default_rng(0).normal(size=(400, 3)), mask=np.zeros((400, 2)))
    content = bytearray(file.read_bytes())
    content[200:400] = bytes(200)
    file.write_bytes(content)
    with pytest.raises(WrongCall, match=r"is no .npz file"):
        read(file, Two())


def test_answers_lie_beside_the_inputs(tmp_path: Path) -> None:
    """Whole numbers are classes, floats are numbers; an argument of that name is no answer."""
    file = saved(tmp_path, x=X, mask=MASK, targets=np.array([0, 1, 1, 0], dtype=np.int32))
    found = read(file, Two(), targets=True)
    assert found.targets is not None
    assert found.targets.dtype == torch.int64
    assert found.names == ("x", "mask")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a name of no argument": (
        {"x": X, "msak": MASK},
        "'msak', but forward takes 'x', 'mask', 'scale'; .* 'mask'",
    ),
    "an argument too few": ({"x": X}, "lacks 'mask'"),
    "too many": ({"x": X, "mask": MASK, "scale": X, "more": X}, "has 4 arrays"),
    "different lengths": ({"x": X, "mask": MASK[:2]}, "different numbers of rows: 'x' 4, 'mask' 2"),
    "NaN": ({"x": np.where(X == 5, np.nan, X), "mask": MASK}, r"'x' is nan at \[1, 2\] \(1 such values\)"),
    "no rows": ({"x": X[:0], "mask": MASK[:0]}, "has no rows"),
    "text": ({"x": np.array(["a"] * 4), "mask": MASK}, "'x' is <U1; a network takes numbers"),
    "a scalar": ({"x": np.float32(1), "mask": MASK}, "'x' is a single number"),
    "too large for the weights": ({"x": X.astype(np.float64) * 1e300, "mask": MASK}, "float32 cannot hold"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit(case: str, tmp_path: Path) -> None:
    arrays, sentence = WRONG[case]
    with pytest.raises(WrongCall, match=sentence):
        read(saved(tmp_path, **arrays), Two())


def test_answers_that_are_needed_and_missing(tmp_path: Path) -> None:
    with pytest.raises(WrongCall, match="has no answers; add an array 'targets'"):
        read(saved(tmp_path, x=X, mask=MASK), Two(), targets=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"x,y\n1,2\n"])
def test_what_is_no_npz_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.npz").write_bytes(content)
    with pytest.raises(WrongCall, match=r"is no .npz file"):
        read(tmp_path / "rows.npz", Two())


def test_a_single_array_and_a_pickle_are_told_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(WrongCall, match=r"single array; save it as .npz"):
        read(tmp_path / "x.npy", Two())
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object), mask=MASK[:1])
    with pytest.raises(WrongCall, match=r"is no .npz file: Object arrays"):
        read(tmp_path / "objects.npz", Two())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WrongCall, match="cannot be read: No such file"):
        read(tmp_path / "rows.npz", Two())
