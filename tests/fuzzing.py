"""How the parsers are fuzzed: how long, and what is done to good messages.

In the tests the examples are few, and the same on every run. `FUZZ_EXAMPLES=100000` (`make fuzz`) makes so many of each
kind, others on every run; one that fails is shrunk, printed, and tried first by the next run.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from service.repository import Live
from service.signature import Datatype, SampleReader, Signature

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))

AS_LONG_AS_IT_TAKES = pytest.mark.timeout(0 if EXAMPLES else 300)

ONE_MESSAGE_LIMIT = timedelta(seconds=5)
"""Far beyond what any of these small messages takes, on a machine that is at work for others too."""


def fuzzed(examples: int) -> settings:
    """
    Args:
        examples: so many in the tests.
    """
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=ONE_MESSAGE_LIMIT,
        suppress_health_check=[HealthCheck.too_slow],
    )


Tensors = Mapping[str, tuple[Datatype, list[int]]]
"""By name, a datatype and a shape."""


def model(inputs: Tensors, outputs: Tensors | None = None) -> Live:
    """As much of a model as parsing and rendering look at; without outputs, each input has one of its kind."""
    sides = inputs, outputs or {f"{name}_out": kind for name, kind in inputs.items()}
    said = [
        [{"name": name, "datatype": datatype, "shape": shape} for name, (datatype, shape) in side.items()]
        for side in sides
    ]
    return stand_in(Signature.model_validate({"inputs": said[0], "outputs": said[1]}))


def stand_in(signature: Signature) -> Live:
    reader = SampleReader(signature) if signature.features is not None else None
    live: Any = SimpleNamespace(name="m", version="1", admitted=SimpleNamespace(signature=signature), reader=reader)
    return live  # type: ignore[no-any-return]


# What is done to a message. Each takes two numbers, which choose where and what.

Change = Callable[[bytes, int, int], bytes]

PIECES = [b"", b"[", b"]", b"{", b"}", b":", b",", b'"', b"\\", b"0", b"-", b".", b"e", b" ", b"\n", b"\0", b"\xff"]
PIECES += [b"\x80", b"[]", b"{}", b'"":0,', b"1,", b"\xef\xbb\xbf", b"\xc3\xa4", b"true", b"null", b"/**/", b"NaN"]
PIECES += [b'"data": [1],', b'"shape": [1],', b'"name": "x",', b'"inputs": [],', b'"id": "1",', b'"parameters": {},']

NUMBERS = ["1e400", "-1e400", "1e39", "-0", "-0.0", "1E5", "1e-400", "0.1e-400", "0e99999", "01", "1.", ".5", "+1"]
NUMBERS += ["1e", "-", "0x1", "1_0", "NaN", "-Infinity", "9007199254740993", "16777217", "4294967297", "256", "-1"]
NUMBERS += ["9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809", "1e20"]
NUMBERS += ["18446744073709551615", "18446744073709551616", "100000000000000000000000", "1.0", "0.5", "1e2"]
NUMBERS += ["3.4028235677973362e38", "3.4028235677973366e38", "7.006492321624085e-46", "5e-324", "2147483648"]
NUMBERS += ["2.4703282292062328e-324", "9" * 400, "9" * 5000]
NUMBERS += ["0." + "0" * 400 + "1", "1" + "0" * 308, "1.7976931348623159e308", "\uff11"]

ENDS = ["128", "-129", "256", "-1", "32768", "65536", "2147483648", "-2147483649", "4294967296", "9223372036854775808"]
ENDS += ["-9223372036854775809", "18446744073709551616", "1e39", "-1e39", "3.4028235677973366e38"]
"""Just beyond what some datatype holds."""

VALUES = ["true", "false", "null", '"1"', '""', "[]", "{}", "[[]]", "[1]", '["x"]', '[":"]', '{"a": 1}']
VALUES += ['{"a": 1, "a": 2}', '{"a": {"b": [{"c": 1, "c": 1}]}}', '"\\u0000"', '"\\ud800"', '"\\udc00"', '"[:{"']
VALUES += ["[" * 150 + "]" * 150, '{"a":' * 150 + "1" + "}" * 150, '"FP32"', '"x"', "[1, 2]", "[0]", "[65537, 0]"]
VALUES += ["1.0", "-1", "1e39"]

LETTERS = ["ä", "\U0001f600", "\u2028", "\x7f", "\x01", "\\u0000", "\\ud83d\\ude00", "\\ud800", "\\n", "\\/"]
LETTERS += ["\\x", "[", ":", "{", "\\u003a", "\\u005B", "A", " "]

AXES = ["0", "1", "2", "3", "4", "6", "1, 1", "", "true", "1.0", "-1", "null", '"1"', "[2]", "65537", "2147483648"]
AXES += ["18446744073709551616", "-0", "1, 0", "0, 70000"]

PAIRS = ['"id": 7', '"id": null', '"id": "a"', '"id": true', '"parameters": {"timeout": true}', '"parameters": []']
PAIRS += ['"parameters": {"timeout": 1.0}', '"parameters": {"timeout": -1}', '"parameters": {"a": null}', '"data": []']
PAIRS += ['"parameters": {"binary_data_output": 1}', '"parameters": {"binary_data_size": 0}', '"inputs": []', '"a": 1']
PAIRS += ['"parameters": {"timeout": 18446744073709551616}', '"outputs": [{"name": "x"}]', '"outputs": [{"name": 1}]']
PAIRS += ['"outputs": [{}]', '"outputs": [{"name": "x_out"}, {"name": "x_out"}]', '"datatype": "FP32"', '"": ":"']
PAIRS += ['"a": "\\u003a", "b": 1, "b": 2', '"a": "\\u005b", "b": [0]', '"a": "]", "b": [[]]', '"a": ":", "a": 1']
PAIRS += ['"name": "x"', '"shape": [1, 3]', '"outputs": [{"name": "x_out", "parameters": {"binary_data": 1}}]']

_SHAPE = re.compile(rb'(?<="shape": \[)[^\]]+(?=\])')
_DATA = re.compile(rb'"data"\s*:\s*\[')
_NEXT_LIST = re.compile(rb",\s*([^\[\]{},]+)\](\s*,\s*)\[")
_ITEM = re.compile(rb"\{[^{}]*\}")
_BRACE = re.compile(rb"\{")
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_SCALAR = re.compile(_STRING.pattern + b"|" + _NUMBER.pattern + b"|true|false|null")
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[-+.\deE]*|\[[^\[\]{}]*\]|\{[^{}]*\}|true|false|null')
_PAIR = re.compile(_STRING.pattern + rb"\s*:\s*(?:" + _VALUE.pattern + rb")")
_JOINT = re.compile(rb"[\[\]{}:,]")


def _found(pattern: re.Pattern[bytes], body: bytes, a: int) -> re.Match[bytes] | None:
    found = list(pattern.finditer(body))
    return found[a % len(found)] if found else None


def _put(body: bytes, place: re.Match[bytes] | None, piece: bytes) -> bytes:
    return body if place is None else body[: place.start()] + piece + body[place.end() :]


def turn_a_bit(body: bytes, a: int, b: int) -> bytes:
    if not body:
        return body
    at = a % len(body)
    return body[:at] + bytes([body[at] ^ 1 << b % 8]) + body[at + 1 :]


def insert(body: bytes, a: int, b: int) -> bytes:
    at = a % (len(body) + 1)
    return body[:at] + PIECES[b % len(PIECES)] + body[at:]


def replace(body: bytes, a: int, b: int) -> bytes:
    at = a % (len(body) + 1)
    return body[:at] + PIECES[b % len(PIECES)] + body[at + 1 :]


def drop(body: bytes, a: int, b: int) -> bytes:
    at = a % (len(body) + 1)
    return body[:at] + body[at + b % 12 + 1 :]


def cut(body: bytes, a: int, b: int) -> bytes:
    return body[: a % (len(body) + 1)]


def double(body: bytes, a: int, b: int) -> bytes:
    at = a % (len(body) + 1)
    end = at + b % 80 + 1
    return body[:end] + body[at:end] + body[end:]


def put_a_number(body: bytes, a: int, b: int) -> bytes:
    return _put(body, _found(_NUMBER, body, a), NUMBERS[b % len(NUMBERS)].encode())


def put_a_value(body: bytes, a: int, b: int) -> bytes:
    """For a whole one, or for a number or a string inside it."""
    return _put(body, _found(_VALUE if b % 2 else _SCALAR, body, a), VALUES[b // 2 % len(VALUES)].encode())


def change_an_element(body: bytes, a: int, b: int) -> bytes:
    """One of the data of a tensor."""
    if (data := _found(_DATA, body, a)) is None:
        return body
    elements = list(_SCALAR.finditer(body, data.end(), max(body.find(b"}", data.end()), data.end())))
    if not elements:
        return body
    element = elements[a // 16 % len(elements)]
    if b % 5 == 0:
        return _put(body, element, b"[" + element[0] + b"]")
    of = (ENDS, NUMBERS, VALUES, VALUES)[b % 5 - 1]
    return _put(body, element, of[b // 5 % len(of)].encode())


def put_a_letter(body: bytes, a: int, b: int) -> bytes:
    if (string := _found(_STRING, body, a)) is None:
        return body
    at = string.start() + 1 + b % (len(string[0]) - 1)
    return body[:at] + LETTERS[b % len(LETTERS)].encode() + body[at:]


def escape(body: bytes, a: int, b: int) -> bytes:
    """A letter of a string in another spelling: it means the same."""
    if (string := _found(_STRING, body, a)) is None or len(string[0]) < 3 or b"\\" in string[0] or max(string[0]) > 127:
        return body
    at = string.start() + 1 + b % (len(string[0]) - 2)
    return body[:at] + (b"\\u%04x" if b % 2 else b"\\u%04X") % body[at] + body[at + 1 :]


def change_case(body: bytes, a: int, b: int) -> bytes:
    string = _found(_STRING, body, a)
    return _put(body, string, string[0].swapcase()) if string else body


def give_twice(body: bytes, a: int, b: int) -> bytes:
    """A key and its value; the second time, now and then, with another value."""
    if (pair := _found(_PAIR, body, a)) is None:
        return body
    again = pair[0] if b % 2 else pair[0].split(b":")[0] + b": " + VALUES[b % len(VALUES)].encode()
    return _put(body, pair, pair[0] + b", " + again)


def send_twice(body: bytes, a: int, b: int) -> bytes:
    """An object in a list."""
    item = _found(_ITEM, body, a)
    return _put(body, item, item[0] + b", " + item[0]) if item else body


def leave_out(body: bytes, a: int, b: int) -> bytes:
    """A key and its value."""
    if (pair := _found(_PAIR, body, a)) is None:
        return body
    before, after = body[: pair.start()].rstrip(), body[pair.end() :].lstrip()
    if after.startswith(b","):
        return before + after[1:]
    return before.removesuffix(b",") + after


def swap(body: bytes, a: int, b: int) -> bytes:
    """Two strings, keys among them."""
    strings = [found.span() for found in _STRING.finditer(body)]
    if not strings:
        return body
    (start_a, end_a), (start_b, end_b) = sorted(strings[i % len(strings)] for i in (a, b))
    if start_a == start_b:
        return body
    return body[:start_a] + body[start_b:end_b] + body[end_a:start_b] + body[start_a:end_a] + body[end_b:]


def change_an_axis(body: bytes, a: int, b: int) -> bytes:
    """One of a shape, or its type; or all of them turned round."""
    if (shape := _found(_SHAPE, body, a)) is None:
        return body
    axes = shape[0].split(b", ")
    at = b // 4 % len(axes)
    match b % 4:
        case 0:
            axes.reverse()
        case 1:
            axes[at] = b"true" if axes[at] == b"1" else axes[at] + b".0"
        case _:
            axes[at] = AXES[b // 16 % len(AXES)].encode()
    return _put(body, shape, b", ".join(axes))


def regroup(body: bytes, a: int, b: int) -> bytes:
    """The last value of a list becomes the first of the next: as many, but ragged."""
    place = _found(_NEXT_LIST, body, a)
    return _put(body, place, b"]" + place[2] + b"[" + place[1] + b", ") if place else body


def add_a_pair(body: bytes, a: int, b: int) -> bytes:
    """At the beginning of an object."""
    brace = _found(_BRACE, body, a)
    return _put(body, brace, b"{" + PAIRS[b % len(PAIRS)].encode() + b", ") if brace else body


def nest(body: bytes, a: int, b: int) -> bytes:
    if (value := _found(_VALUE, body, a)) is None:
        return body
    depth = 150 if b % 40 == 0 else b % 4 + 1
    return _put(body, value, b"[" * depth + value[0] + b"]" * depth)


def space(body: bytes, a: int, b: int) -> bytes:
    """Where JSON takes white space, and what it takes for it; and what it does not."""
    joint = _found(_JOINT, body, a)
    return _put(body, joint, joint[0] + (b" ", b"\n\t\r ", b"  ", b"\x0c", b"\xc2\xa0")[b % 5]) if joint else body


def mark(body: bytes, a: int, b: int) -> bytes:
    return b"\xef\xbb\xbf" + body


TO_BYTES: Sequence[Change] = (turn_a_bit, insert, replace, drop, cut, double)
TO_JSON: Sequence[Change] = (
    *(put_a_number, put_a_value, put_a_letter, escape, change_case, change_an_axis, add_a_pair, give_twice, leave_out),
    *(change_an_element, swap, nest, regroup, space, mark, *TO_BYTES),
)
ONE_FAULT: Sequence[Change] = (
    *(change_an_element, change_an_element, change_an_element, change_an_axis, change_an_axis),
    *(put_a_number, put_a_value, add_a_pair, give_twice, send_twice, leave_out, nest, regroup),
)
"""What leaves JSON as JSON."""

Changes = list[tuple[Change, int, int]]


def changes(of: Sequence[Change], *, most: int = 2) -> st.SearchStrategy[Changes]:
    """One or more of them, in order: drawn evenly, where hypothesis would come back to a few places."""

    def drawn(seed: int) -> Changes:
        generator = random.Random(seed)
        return [
            (generator.choice(of), generator.randrange(2**20), generator.randrange(2**20))
            for _ in range(generator.randint(1, most))
        ]

    return st.integers(0, 2**24 - 1).map(drawn)


def changed(body: bytes, made: Iterable[tuple[Change, int, int]]) -> bytes:
    for change, a, b in made:
        body = change(body, a, b)
    return body
