"""The elements of one tensor, between the wire and an array: in JSON, and in the bytes of the binary extension.

The wire is strict: nothing is rounded to fit, nothing wraps, a boolean is not a number, a string is not a number.
Bytes are little-endian and row-major; BOOL is one byte, 0 or 1; an element of BYTES is its length in four bytes, then
itself (triton-inference-server, `docs/protocol/extension_binary_data.md`).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import (
    MalformedBinary,
    NeedsBinary,
    NotUtf8,
    OutOfRange,
    ShapeMismatch,
    WrongType,
    clipped,
)
from service.signature import TensorSpec

_JSON_TYPES: dict[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "booleans"),
    "i": (frozenset({int}), "integers"),
    "u": (frozenset({int}), "integers"),
    "f": (frozenset({int, float}), "numbers"),
    "O": (frozenset({str}), "strings"),
}
_AT_ONCE = 2**16
"""So many numbers are written in some milliseconds, in which no other thread runs."""

_LENGTH = struct.Struct("<I")


def from_json(spec: TensorSpec, data: list[Any], shape: Sequence[int]) -> NDArray[Any]:
    """The values of a JSON list, flat or nested as `shape` says.

    Returns:
        An array of the tensor's dtype and of this shape.

    Raises:
        NeedsBinary: the datatype has no JSON form.
        WrongType, OutOfRange: a value is not one of the datatype.
        ShapeMismatch: the list is ragged, or does not fill the shape.
    """
    if spec.datatype == "FP16":
        raise NeedsBinary(tensor=spec.name, datatype=spec.datatype, kind="input")
    types = set(map(type, data))
    if list in types:
        data = _flattened(spec, data, shape)
        types = set(map(type, data))
    if not types <= _JSON_TYPES[spec.dtype.kind][0]:
        raise fault_among(spec, data)
    check_count(spec, len(data), shape)
    try:
        array = from_floats(data) if spec.datatype == "FP32" else np.array(data, dtype=spec.dtype)
    except OverflowError:
        raise _first_out_of_range(spec, data) from None
    return array.reshape(shape)


def fault_among(spec: TensorSpec, values: list[Any], at: int = 0) -> WrongType | OutOfRange:
    """What is wrong with the first value that is not one of the datatype; there is one.

    Args:
        at: where in the tensor they begin.
    """
    allowed, plural = _JSON_TYPES[spec.dtype.kind]
    i = next((i for i, value in enumerate(values) if type(value) not in allowed), None)
    if i is None:
        return _first_out_of_range(spec, values, at)
    if plural == "integers" and type(values[i]) is float and not -(2.0**63) < values[i] < 2.0**64:
        return _out_of_range(spec, at + i, values[i])  # a parser makes a float of an integer of more than 64 bits
    what = f"value {at + i} of input '{spec.name}'"
    return WrongType(what=what, got=values[i], want=f"{plural} ({spec.datatype})")


def from_floats(values: list[Any]) -> NDArray[np.float32]:
    """Numbers as float32, flat.

    Raises:
        OverflowError: one is outside its range. NumPy would make an infinity of it, and so would `struct` without "=".
    """
    return np.frombuffer(struct.pack(f"={len(values)}f", *values), dtype=np.float32)


def from_numbers(spec: TensorSpec, numbers: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """`from_json` for numbers that a parser already put into an array.

    Args:
        numbers: float64, int64 or uint64, flat and as many as the shape holds; not changed.
    """
    dtype = spec.dtype
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = numbers.astype(dtype, copy=False)
        fits = bool(np.isfinite(array).all())
    else:
        low, high = _limits(dtype)
        fits = not numbers.size or bool(low <= int(numbers.min()) and int(numbers.max()) <= high)
        array = numbers.astype(dtype, copy=False)
    if not fits:
        low, high = _limits(dtype)
        i = int(np.argmin((numbers >= low) & (numbers <= high)))
        raise _out_of_range(spec, i, numbers[i].item())
    return array.reshape(shape)


def to_json(array: NDArray[Any]) -> Any:
    """What the serialiser writes as the flat `data` of an output."""
    flat = array.reshape(-1)
    if array.dtype.kind == "O":
        return flat.tolist()
    flat = np.ascontiguousarray(flat)
    if flat.size <= _AT_ONCE:
        return flat
    parts = [flat[i : i + _AT_ONCE] for i in range(0, flat.size, _AT_ONCE)]
    return orjson.Fragment(
        b"[%b]" % b",".join([orjson.dumps(it, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for it in parts])
    )


def from_bytes(spec: TensorSpec, content: memoryview, shape: Sequence[int]) -> NDArray[Any]:
    """The elements of a binary tensor: a view of `content` where the datatype allows it.

    Raises:
        MalformedBinary: the bytes are too few or too many for the shape, or a BOOL is neither 0 nor 1.
        NotUtf8: an element of BYTES is not text.
    """
    count = math.prod(shape)
    if spec.dtype.kind == "O":
        return np.array(_texts(spec, content, count), dtype=np.object_).reshape(shape)
    wanted = count * spec.dtype.itemsize
    if len(content) != wanted:
        raise MalformedBinary(
            f"input '{spec.name}' has {len(content)} bytes; {spec.datatype} of shape {list(shape)} takes {wanted}"
        )
    if spec.dtype.kind == "b":
        ones = np.frombuffer(content, dtype=np.uint8)
        if ones.size and ones.max() > 1:
            raise MalformedBinary(f"input '{spec.name}' is BOOL and has a byte {ones.max()}; each is 0 or 1")
        return ones.view(np.bool_).reshape(shape)
    array = np.frombuffer(content, dtype=spec.dtype.newbyteorder("<")).reshape(shape)
    # what follows JSON of any length may start anywhere, and processors read what is aligned
    return np.require(array, dtype=spec.dtype, requirements="A")


def to_bytes(array: NDArray[Any]) -> bytes:
    """The bytes of a binary tensor."""
    if array.dtype.kind == "O":
        texts = [str(item).encode() for item in array.reshape(-1)]
        return b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def check_count(spec: TensorSpec, count: int, shape: Sequence[int]) -> None:
    """
    Raises:
        ShapeMismatch: so many values do not fill the shape.
    """
    if count != math.prod(shape):
        raise ShapeMismatch(
            tensor=spec.name,
            got=f"{count} values for shape {list(shape)}, which has {math.prod(shape)}",
            want=f"shape {list(spec.shape)}",
        )


def text_of(spec: TensorSpec, content: bytes) -> str:
    """
    Raises:
        NotUtf8: a string tensor holds text only.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise NotUtf8(tensor=spec.name, position=error.start) from None


def _flattened(spec: TensorSpec, data: list[Any], shape: Sequence[int]) -> list[Any]:
    """Nested lists as one flat list, row-major."""
    for depth, axis in enumerate(shape):
        if len(data) != math.prod(shape[: depth + 1]):
            raise ShapeMismatch(
                tensor=spec.name,
                got=f"data that are not lists of {axis} at depth {depth + 1}",
                want=f"flat data, or nested as its shape {list(shape)} says",
            )
        if depth == len(shape) - 1:
            break
        if not all(type(item) is list and len(item) == shape[depth + 1] for item in data):
            raise ShapeMismatch(
                tensor=spec.name,
                got=f"ragged data: not only lists of {shape[depth + 1]} at depth {depth + 2}",
                want=f"flat data, or nested as its shape {list(shape)} says",
            )
        data = list(itertools.chain.from_iterable(data))
    return data


def _texts(spec: TensorSpec, content: memoryview, count: int) -> list[str]:
    texts: list[str] = []
    start = 0
    while start < len(content):
        end = start + _LENGTH.size
        if end <= len(content):
            end += _LENGTH.unpack_from(content, start)[0]
        if end > len(content):
            raise MalformedBinary(
                f"element {len(texts)} of input '{spec.name}' ends at byte {end} of {len(content)}; "
                "each element is its length in four bytes, then itself"
            )
        texts.append(text_of(spec, bytes(content[start + _LENGTH.size : end])))
        start = end
    if len(texts) != count:
        raise MalformedBinary(f"input '{spec.name}' has {len(texts)} elements; its shape takes {count}")
    return texts


def _first_out_of_range(spec: TensorSpec, values: list[Any], at: int = 0) -> OutOfRange:
    low, high = _limits(spec.dtype)
    i = next((i for i, value in enumerate(values) if not low <= value <= high), 0)
    return _out_of_range(spec, at + i, values[i])


def _out_of_range(spec: TensorSpec, i: int, value: float) -> OutOfRange:
    low, high = _limits(spec.dtype)
    return OutOfRange(
        what=f"value {i} of input '{spec.name}'",
        got=clipped(str(value), 40),
        want=f"{spec.datatype} from {low} to {high}",
    )


def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind == "f":
        return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
