"""Large inference requests in JSON, read without a Python object for each number.

A SIMD parser (simdjson, https://doi.org/10.1007/s00778-019-00578-5) keeps the document in its own memory and hands out
arrays of numbers as buffers: for an image of 3x224x224 that is three times faster than a list of floats and an array
made of it. It is lenient in one point, it flattens nested lists of any form, so their form is checked here. Whatever
does not fit what this file knows is given back unread: the ordinary way then says what is wrong with it.

No parser lets another thread run before it is done, and for the largest bodies that is a second. So a long flat list is
cut out of the text before that is parsed, with a word that nobody can guess in its place, and read piece by piece.
"""

from __future__ import annotations

import codecs
import math
import secrets
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from service.protocol.json import check_keys, count, is_all_structure

LARGE_BYTES = 32 * 1024
"""From here on it pays; below, the ordinary parser is as fast."""

CUT_BYTES = 4 * 1024 * 1024
"""From here on long lists are read in pieces, which takes a little longer: what is smaller is read in some ten
milliseconds."""

_MOST_KEYS, _MOST_AXES = 16, 32
"""More are looked at in the ordinary way: here finding a key and multiplying axes takes as long as there are others."""

_TYPES = {"f": frozenset({int, float}), "i": frozenset({int}), "u": frozenset({int})}
"""That Python has for what stands in a list of numbers, by kind."""

_PIECE_BYTES = 128 * 1024
"""Parsed in about a millisecond. What is cut out is longer."""

_BUFFERS: dict[str, tuple[Literal["d", "i", "u"], Any]] = {
    "f": ("d", np.float64),
    "i": ("i", np.int64),
    "u": ("u", np.uint64),
}


class Flawed(NamedTuple):
    """In place of data that are not all numbers of their kind: a part of them in which one is not."""

    values: list[Any]
    at: int
    """Where the part begins."""


def parsed_large(body: bytes, kinds: Mapping[str, str]) -> dict[str, Any] | None:
    """The request with the `data` of each numeric input as a flat array of float64, int64 or uint64, or `Flawed`.

    Args:
        kinds: for each input of the model, the kind of its NumPy dtype.

    Returns:
        None if it is anything but a well-formed request with numbers for this model's inputs.

    Raises:
        DuplicateKey: an object in it has a key twice.
    """
    if body.startswith(codecs.BOM_UTF8) or is_all_structure(body):  # simdjson skips a byte order mark
        return None
    if len(body) >= CUT_BYTES:
        text, cut = _without_long_lists(body)
        if cut and (request := _parsed(text, kinds, cut)) is not None:
            return request
    return _parsed(body, kinds, {})


def _parsed(text: bytes, kinds: Mapping[str, str], cut: dict[str, bytes]) -> dict[str, Any] | None:
    """The same, of a text from which this was cut out."""
    try:
        document = simdjson.Parser().parse(text)
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
            inputs = [_input(value[i], kinds, cut) for i in range(len(value))]
            lists = sum(count for _, count in inputs)
            request[key] = [tensor for tensor, _ in inputs]
        if count(text, b"[") != lists + _lists(request):  # a list where a number should be, or a bracket in a string
            return None
        if cut:  # what was not the data of an input
            return None
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):
        return None
    check_keys(text, request)
    return request


def _without_long_lists(body: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The text with a word in each long list without lists in it, and what was there, by that word."""
    kept: list[bytes] = []
    cut: dict[str, bytes] = {}
    done, start = 0, body.find(b"[")
    while start >= 0:
        following = body.find(b"[", start + 1)
        before = len(body) if following < 0 else following
        if before - start > _PIECE_BYTES and (end := body.find(b"]", start, before)) - start > _PIECE_BYTES:
            inside = body[start + 1 : end]
            if b"{" not in inside:  # an object may have a key twice
                word = secrets.token_hex(16)
                kept += [body[done : start + 1], b'"%b"' % word.encode()]
                cut[word] = inside
                done = end
        start = following
    kept.append(body[done:])
    return b"".join(kept), cut


def _in_pieces(text: bytes, kind: str) -> NDArray[Any] | Flawed:
    """
    Args:
        text: a list without its brackets.

    Raises:
        ValueError: it is no list, or a number is too large.
    """
    buffer, dtype = _BUFFERS[kind]
    parts: list[NDArray[Any] | list[Any]] = []
    flawed: Flawed | None = None
    start = at = 0
    while start <= len(text):
        end = text.find(b",", start + _PIECE_BYTES)
        end = len(text) if end < 0 else end
        piece = b"[%b]" % text[start:end]
        try:
            part = np.frombuffer(simdjson.Parser().parse(piece).as_buffer(of_type=buffer), dtype=dtype)  # type: ignore[union-attr]
        except (ValueError, TypeError, RuntimeError):
            part = values = orjson.loads(piece)
            if not _TYPES[kind].issuperset(map(type, values)):
                flawed = flawed or Flawed(values, at)
            elif kind != "f":
                raise ValueError("too large") from None
        if not len(part):
            raise ValueError("nothing between two commas")
        parts.append(part)
        at += len(part)
        start = end + 1
    return flawed or np.concatenate([np.asarray(part, dtype=dtype) for part in parts])


def _input(tensor: Any, kinds: Mapping[str, str], cut: dict[str, bytes]) -> tuple[dict[str, Any], int]:
    """A tensor, and how many lists its data are made of; what was cut out is taken from there."""
    if len(tensor) > _MOST_KEYS or len(tensor["shape"]) > _MOST_AXES:
        raise ValueError("no tensor")
    said = {key: _plain(tensor[key]) for key in tensor.keys() if key != "data"}  # noqa: SIM118
    data, kind = tensor["data"], kinds[said["name"]]
    if cut and len(data) == 1 and isinstance(word := data[0], str) and word in cut:
        said["data"], lists = _in_pieces(cut.pop(word), kind), 1
    else:
        said["data"], lists = _numbers(data, said["shape"], kind)
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
