"""Large inference requests in JSON, read without a Python object for each number.

A SIMD parser (simdjson, https://doi.org/10.1007/s00778-019-00578-5) keeps the document in its own memory and hands out
arrays of numbers as buffers: for an image of 3x224x224 that is three times faster than a list of floats and an array
made of it. It is lenient in one point, it flattens nested lists of any form, so their form is checked here. Whatever
does not fit what this file knows is given back unread: the ordinary way then says what is wrong with it.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import simdjson
from numpy.typing import NDArray

from service.protocol.json import check_keys, count, is_all_structure

LARGE_BYTES = 32 * 1024
"""From here on it pays; below, the ordinary parser is as fast."""

_MOST_KEYS, _MOST_AXES = 16, 32
"""More are looked at in the ordinary way: here finding a key and multiplying axes takes as long as there are others."""

_BUFFERS: dict[str, tuple[Literal["d", "i", "u"], Any]] = {
    "f": ("d", np.float64),
    "i": ("i", np.int64),
    "u": ("u", np.uint64),
}


def parsed_large(body: bytes, kinds: Mapping[str, str]) -> dict[str, Any] | None:
    """The request with the `data` of each numeric input as a flat array of float64, int64 or uint64.

    Args:
        kinds: for each input of the model, the kind of its NumPy dtype.

    Returns:
        None if it is anything but a well-formed request with numbers for this model's inputs.

    Raises:
        DuplicateKey: an object in it has a key twice.
    """
    if body.startswith(codecs.BOM_UTF8) or is_all_structure(body):  # simdjson skips a byte order mark
        return None
    try:
        document = simdjson.Parser().parse(body)
        if not isinstance(document, simdjson.Object) or len(document) > _MOST_KEYS:
            return None
        lists = 0
        request: dict[str, Any] = {}
        for key in document.keys():  # noqa: SIM118  # iterating the object itself, or its items, makes Python values of all
            value = document[key]
            if key != "inputs":
                request[key] = _plain(value)
                continue
            if not isinstance(value, simdjson.Array) or len(value) > len(kinds):
                return None
            inputs = [_input(value[i], kinds) for i in range(len(value))]
            lists = sum(count for _, count in inputs)
            request[key] = [tensor for tensor, _ in inputs]
        if count(body, b"[") != lists + _lists(request):  # a list where a number should be, or a bracket in a string
            return None
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):
        return None
    check_keys(body, request)
    return request


def _input(tensor: Any, kinds: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """A tensor, and how many lists its data are made of."""
    if len(tensor) > _MOST_KEYS or len(tensor["shape"]) > _MOST_AXES:
        raise ValueError("no tensor")
    said = {key: _plain(tensor[key]) for key in tensor.keys() if key != "data"}  # noqa: SIM118
    said["data"], lists = _numbers(tensor["data"], said["shape"], kinds[said["name"]])
    return said, lists


def _numbers(data: Any, shape: list[int], kind: str) -> tuple[NDArray[Any], int]:
    """The numbers, flat, and how many lists they came in: one, or as many as the shape has.

    Raises:
        ValueError, TypeError, LookupError: they are not numbers of this kind, or not lists of this form.
    """
    buffer, dtype = _BUFFERS[kind]
    lists = [data]
    if isinstance(data[0], simdjson.Array):
        level = lists
        for depth, axis in enumerate(shape):
            if any(len(one) != axis for one in level):
                raise ValueError("ragged")
            if depth < len(shape) - 1:
                level = [inner for one in level for inner in one]
                lists += level
    numbers = np.frombuffer(data.as_buffer(of_type=buffer), dtype=dtype)
    if numbers.size != math.prod(shape):
        raise ValueError("too few or too many")
    return numbers, len(lists)


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Object):
        return value.as_dict()
    return value.as_list() if isinstance(value, simdjson.Array) else value


def _lists(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_lists, value.values()))
    return 1 + sum(map(_lists, value)) if isinstance(value, list) else 0
