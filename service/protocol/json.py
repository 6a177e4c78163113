"""JSON in and errors out, the same on every wire."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import orjson

from service.errors import DuplicateKey, MalformedJson, RequestError

_LARGE_BYTES = 4096
_FEW = 64
_NESTED = (dict, list)

MOST_NESTED = 2**17
MOST_KEYS = 2**18
"""Each becomes an object of Python, and nobody is answered while they are made; brackets and colons in strings count
too."""

_NUMBERS = re.compile(rb"\[[-+0-9.eE,\s]{1024,}\]")

NULL_FOR_MISSING = "null stands for a missing value, in a feature that takes one"
BINARY_FOR_NAN = "send the tensor in its binary form, with 'binary_data_size' in its parameters"


def parsed(body: bytes, *, for_nan: str = "") -> Any:
    """
    Args:
        for_nan: what a caller should do who wants to send NaN or Infinity, where that can be meant.

    Raises:
        MalformedJson: the body is empty, is not UTF-8, or is not JSON as RFC 8259 has it, which knows no NaN.
    """
    if not body:
        raise MalformedJson("it is empty")
    if is_all_structure(body):
        raise MalformedJson(
            f"it has more than {MOST_NESTED} lists and objects, or more than {MOST_KEYS} keys; send data flat or binary"
        )
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno} column {error.colno}"
        if any(word in body for word in (b"NaN", b"Infinity")):
            reason += "; JSON has no NaN or Infinity" + (f"; {for_nan}" if for_nan else "")
        raise MalformedJson(reason) from error


def is_all_structure(body: bytes) -> bool:
    """It has more than `MOST_NESTED` lists and objects, or more than `MOST_KEYS` keys."""
    return len(body) > MOST_NESTED and (
        count(body, b"{") + count(body, b"[") > MOST_NESTED or count(body, b":") > MOST_KEYS
    )


def check_keys(body: bytes, value: object) -> None:
    """No object has a key twice; parsers differ in what that means.

    A parser keeps one value of a key and forgets the other, so this counts: every colon of the text belongs to a key or
    stands inside a string. If the keys and strings that are left account for all of them, none was forgotten. If they
    do not (an escape, a string that was not looked at), the text is read once more, slowly. Most have as many colons as
    keys at the top, which leaves none for another.

    Args:
        value: what a parser made of `body`; data of tensors may be left out.

    Raises:
        DuplicateKey: there is one.
        MalformedJson: it is nested too deeply to tell, or has a number that is too long.
    """
    try:
        colons = count(body, b":")
        if type(value) is dict and colons == len(value):
            return
        if b"\\" not in body and colons == _colons(value):
            return
        try:  # without the numbers, which have no keys and take most of the time
            json.loads(_NUMBERS.sub(b"[]", body), object_pairs_hook=_no_key_twice)
        except DuplicateKey:  # so it is, unless the numbers were in the names of keys
            json.loads(body, object_pairs_hook=_no_key_twice)
    except RecursionError as error:
        raise MalformedJson("it is nested too deeply") from error
    except ValueError as error:  # Python's parser is stricter here and there: integers of more than 4,300 digits
        raise MalformedJson(str(error)) from error


def count(text: bytes, character: bytes) -> int:
    """How often a character is in a text: `bytes.count`, but fast for a large one. A few are found one by one; if there
    are many, NumPy counts the rest."""
    if len(text) < _LARGE_BYTES:
        return text.count(character)
    found, at = 0, text.find(character)
    while at >= 0 and found < _FEW:
        found += 1
        at = text.find(character, at + 1)
    if at < 0:
        return found
    return found + int(np.count_nonzero(np.frombuffer(text, dtype=np.uint8, offset=at) == ord(character)))


def _colons(value: Any) -> int:
    """How many colons the JSON of this value has, by its keys and its strings. Of lists only those of objects count."""
    if type(value) is dict:
        strings = [*value, *[item for item in value.values() if type(item) is str]]
        nested = [item for item in value.values() if type(item) in _NESTED]
        return len(value) + "".join(strings).count(":") + sum(map(_colons, nested))
    return sum(map(_colons, value)) if type(value) is list and value and type(value[0]) is dict else 0


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        raise DuplicateKey(key=next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return unique


def error_body(error: RequestError) -> bytes:
    """`{"error": "...", "code": "..."}`, the body of every answer that is not a success."""
    return orjson.dumps({"error": str(error), "code": error.code})
