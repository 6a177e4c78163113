"""Arrays of answers: how far two are apart, how far rounding may take them, and rows to try a model with.

Pure. What is here says nothing about what is right; the doors of `service.admission` and `export.parity` judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from service.signature import DATATYPES, TensorSpec


def rounding_bounds(
    model: onnx.ModelProto, outputs: Sequence[TensorSpec], answers: Sequence[NDArray[Any]]
) -> list[float]:
    """How far another order of summation may move each output of a model that came without a tolerance.

    n u times the largest answer (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1), where n
    adds up the lengths of all the sums of the graph. That leaves out its condition: it may refuse wrongly, but hardly
    admit.

    Args:
        answers: one array per output.
    """
    roundoff = _coarsest_roundoff(model, outputs)
    # a bound as large as the answer would say nothing: half of the digits must agree
    factor = min(summation_length(model) * roundoff, math.sqrt(roundoff) / 2)
    return [factor * largest_value(array) for array in answers]


def made_up_rows(inputs: Sequence[TensorSpec], *, count: int) -> list[NDArray[Any]]:
    """Rows for a model that came without samples: seeded noise for numbers, 0 and 1 for indices.

    An axis of any length is 4 long. Large contrasts between rows make a neighbour's influence visible.
    """
    generator = np.random.default_rng(20260101)
    arrays: list[NDArray[Any]] = []
    for spec in inputs:
        fixed = spec.shape[0] if spec.shape else -1
        shape = (max(count, fixed), *(4 if axis == -1 else axis for axis in spec.shape[1:]))
        dtype = DATATYPES[spec.datatype]
        if dtype.kind == "f":
            scales = np.geomspace(0.25, 4.0, shape[0]).reshape(-1, *([1] * (len(shape) - 1)))
            arrays.append((generator.standard_normal(shape) * scales).astype(dtype))
        elif dtype.kind == "O":
            arrays.append(np.full(shape, "a", dtype=np.object_))
        else:
            arrays.append(generator.integers(0, 2, size=shape).astype(dtype))
    return arrays


def _coarsest_roundoff(model: onnx.ModelProto, outputs: Sequence[TensorSpec]) -> float:
    """Half the distance from 1 to the next number, in the coarsest float type that the weights or outputs have."""
    weights = {onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in model.graph.initializer}
    floats = [dtype for dtype in (*weights, *(spec.dtype for spec in outputs)) if dtype.kind == "f"]
    return max((float(np.finfo(dtype).eps) / 2 for dtype in floats), default=0.0)


def summation_length(model: onnx.ModelProto) -> int:
    """The lengths of the sums in MatMul, Gemm, Conv and ConvTranspose, added up; any other node counts 8 roundings."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        shape = sizes.get(node.input[1], ()) if len(node.input) > 1 else ()
        match node.op_type:
            case "Conv" if shape:
                total += int(np.prod(shape[1:]))
            case "MatMul" | "Gemm" | "ConvTranspose" if shape:
                total += max(shape)
            case _:
                total += 8
    return total


def largest_difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest absolute difference of two arrays of equal shape; infinite where only one of them is not finite."""
    if one.dtype.kind not in "fc":
        return 0.0 if np.array_equal(one, other) else float("inf")
    a, b = one.astype(np.float64), other.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))


def largest_value(output: NDArray[Any]) -> float:
    """The largest absolute value, infinities and NaN left out."""
    if output.dtype.kind != "f":
        return 0.0
    return float(np.abs(output.astype(np.float64)).max(initial=0.0, where=np.isfinite(output)))


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.dtype == np.object_:
        return bool(np.array_equal(one, other))
    return one.shape == other.shape and one.tobytes() == other.tobytes()
