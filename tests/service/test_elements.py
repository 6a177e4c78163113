"""Elements of tensors on the wire: what is sent is what arrives, bit for bit, or a sentence says why not."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from numpy.typing import NDArray

from service.errors import (
    MalformedBinary,
    NeedsBinary,
    NotUtf8,
    OutOfRange,
    RequestError,
    ShapeMismatch,
    WrongType,
)
from service.protocol.elements import from_bytes, from_json, from_numbers, to_bytes, to_json
from service.signature import DATATYPES, TensorSpec

FIXED = [datatype for datatype in DATATYPES if datatype != "BYTES"]
INTEGERS = [datatype for datatype in DATATYPES if "INT" in datatype]
IN_JSON = [datatype for datatype in DATATYPES if datatype != "FP16"]

shapes = st.lists(st.integers(0, 4), max_size=4)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
"""Any text that UTF-8 can hold: empty ones, NUL, and characters of up to four bytes."""


def spec(datatype: str) -> TensorSpec:
    return TensorSpec.model_validate({"name": "x", "datatype": datatype, "shape": [-1, 3]})


def arrays(datatype: str, shape: Sequence[int]) -> st.SearchStrategy[NDArray[Any]]:
    """Every value of the datatype, by its bits: NaN with any payload, denormals, both zeros, both ends."""
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        return hypothesis_numpy.arrays(dtype, tuple(shape), elements=texts, fill=st.nothing())
    if datatype == "BOOL":
        return hypothesis_numpy.arrays(dtype, tuple(shape))
    size = int(np.prod(shape)) * dtype.itemsize
    return st.binary(min_size=size, max_size=size).map(lambda bits: np.frombuffer(bits, dtype=dtype).reshape(shape))


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.dtype == np.object_:
        return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def through_json(array: NDArray[Any]) -> list[Any]:
    """As a client reads it, with a parser that is not the server's."""
    data: list[Any] = json.loads(orjson.dumps(to_json(array), option=orjson.OPT_SERIALIZE_NUMPY))
    return data


@pytest.mark.parametrize("datatype", DATATYPES)
@settings(max_examples=25)
@given(st.data())
def test_bytes_there_and_back_are_the_same_bits(datatype: str, data: st.DataObject) -> None:
    """Of every datatype, every value and every shape, from any place in a body."""
    shape = data.draw(shapes)
    array = data.draw(arrays(datatype, shape))
    content = to_bytes(array)
    padding = data.draw(st.integers(0, 7))
    body = bytes(padding) + content
    read = from_bytes(spec(datatype), memoryview(body)[padding:], shape)
    assert same(read, array)
    assert read.flags.aligned
    assert to_bytes(read) == content


@pytest.mark.parametrize("datatype", IN_JSON)
@settings(max_examples=25)
@given(st.data())
def test_json_there_and_back_is_the_same_bits(datatype: str, data: st.DataObject) -> None:
    """Whatever is finite; flat as it is written, and nested as a client may send it."""
    shape = data.draw(shapes)
    array = data.draw(arrays(datatype, shape))
    if array.dtype.kind == "f":
        array = np.where(np.isfinite(array), array, array.dtype.type(-0.0))
    flat = through_json(array)
    assert same(from_json(spec(datatype), flat, shape), array)
    if shape and 0 not in shape:
        nested = np.array(flat, dtype=np.object_).reshape(shape).tolist()
        assert same(from_json(spec(datatype), nested, shape), array)


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("FP32", [2.0**-149, -(2.0**-149), 2.0**-126, -0.0, 3.4028234663852886e38, 0.1]),
        ("FP64", [5e-324, -5e-324, -0.0, 1.7976931348623157e308, 0.1, 2.0**53 + 2]),
        ("INT64", [-(2**63), 2**63 - 1, 2**53 + 1]),
        ("UINT64", [0, 2**64 - 1, 2**53 + 1]),
        ("BYTES", ["", "\0", "ä", "\U0001f600", '"', "\\", "a:b[c"]),
        ("BOOL", [True, False]),
    ],
)
def test_the_ends_survive_json(datatype: str, values: list[Any]) -> None:
    """Denormals, minus zero, integers that a double cannot hold, empty strings."""
    wanted = np.array(values, dtype=DATATYPES[datatype])
    assert np.array(through_json(wanted), dtype=wanted.dtype).tolist() == wanted.tolist()
    assert same(from_json(spec(datatype), through_json(wanted), [len(values)]), wanted)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_what_is_not_finite_is_null_in_json_and_itself_in_bytes(datatype: str) -> None:
    array = np.array([np.nan, np.inf, -np.inf, 1.5], dtype=DATATYPES[datatype])
    assert through_json(array) == [None, None, None, 1.5]
    assert same(from_bytes(spec(datatype), memoryview(to_bytes(array)), [4]), array)


def test_the_bytes_are_those_of_the_specification() -> None:
    """Little-endian, row-major, a length of four bytes before each string; written out by hand."""
    for datatype, values, wanted in [
        ("INT32", [[1, -2], [258, 2**31 - 1]], b"\x01\0\0\0\xfe\xff\xff\xff\x02\x01\0\0\xff\xff\xff\x7f"),
        ("UINT16", [[1, 2], [3, 0xFF00]], b"\x01\0\x02\0\x03\0\0\xff"),
        ("FP16", [[1.0, -2.0], [2.0**-24, 65504]], b"\0\x3c\0\xc0\x01\0\xff\x7b"),
        ("FP64", [[1.0, 0.0], [-0.0, 2.0]], struct.pack("<4d", 1.0, 0.0, -0.0, 2.0)),
        ("BOOL", [[True, False], [False, True]], b"\1\0\0\1"),
        ("BYTES", [["", "ä"], ["ab", "\0"]], b"\0\0\0\0\x02\0\0\0\xc3\xa4\x02\0\0\0ab\x01\0\0\0\0"),
    ]:
        array = np.array(values, dtype=DATATYPES[datatype])
        assert to_bytes(array) == wanted
        assert to_bytes(np.asfortranarray(array)) == wanted
        assert same(from_bytes(spec(datatype), memoryview(wanted), [2, 2]), array)


def test_a_part_of_an_array_is_written_row_by_row() -> None:
    """A request's rows of a batch are a view, and so may be any other output."""
    whole = np.arange(24, dtype=np.int16).reshape(4, 6)
    for part in (whole[1:3], whole[:, ::2], whole.T):
        assert through_json(part) == part.reshape(-1).tolist()
        assert to_bytes(part) == part.copy(order="C").tobytes()


@pytest.mark.parametrize("datatype", INTEGERS)
def test_an_integer_beyond_either_end_is_refused_and_never_wraps(datatype: str) -> None:
    info = np.iinfo(DATATYPES[datatype])
    low, high = int(info.min), int(info.max)
    assert from_json(spec(datatype), [low, high], [2]).tolist() == [low, high]
    for value in (low - 1, high + 1, high + 2 ** (info.bits), low - 2**info.bits, 10**30):
        with pytest.raises(OutOfRange) as refused:
            from_json(spec(datatype), [0, value], [2])
        assert str(refused.value) == (
            f"value 1 of input 'x' is {value}, which is out of range; it takes {datatype} from {low} to {high}"
        )


@pytest.mark.parametrize("datatype", INTEGERS)
@pytest.mark.parametrize("value", [2.0**64, 1e30, -(2.0**63), -1e30])
def test_an_integer_of_more_than_64_bits_is_out_of_range_too(datatype: str, value: float) -> None:
    """A parser hands it on as a float; that float is not taken for one that somebody wrote."""
    with pytest.raises(OutOfRange, match=re.escape(f"value 1 of input 'x' is {value}, which is out of range")):
        from_json(spec(datatype), [0, value, 1.5], [3])


@pytest.mark.parametrize("datatype", INTEGERS)
def test_an_integer_that_was_parsed_into_an_array_is_held_to_the_same_ends(datatype: str) -> None:
    """int64 is what a parser makes of signed ones, uint64 of unsigned ones."""
    info = np.iinfo(DATATYPES[datatype])
    parsed = np.int64 if datatype.startswith("INT") else np.uint64
    ends = np.array([info.min, info.max], dtype=parsed)
    assert same(from_numbers(spec(datatype), ends, [2]), ends.astype(DATATYPES[datatype]))
    for value in (int(info.min) - 1, int(info.max) + 1):
        if np.iinfo(parsed).min <= value <= np.iinfo(parsed).max:
            with pytest.raises(OutOfRange, match=f"value 1 of input 'x' is {value}, which is out of range"):
                from_numbers(spec(datatype), np.array([0, value], dtype=parsed), [2])


@pytest.mark.parametrize("value", [1e39, -1e39, 3.4028235677973366e38])
def test_a_float_that_would_become_infinite_is_refused(value: float) -> None:
    """The third lies halfway to what would be the next float32, and rounds up."""
    sentence = f"value 1 of input 'x' is {value}, which is out of range; it takes FP32 from -3.4"
    with pytest.raises(OutOfRange, match=re.escape(sentence)):
        from_json(spec("FP32"), [0, value], [2])
    with pytest.raises(OutOfRange, match=re.escape(sentence)):
        from_numbers(spec("FP32"), np.array([0, value]), [2])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_becomes_the_nearest_float32_by_either_parser(value: float) -> None:
    """Or is refused by both."""
    try:
        array = from_json(spec("FP32"), [value], [1])
    except OutOfRange as refused:
        with pytest.raises(OutOfRange, match=re.escape(str(refused))):
            from_numbers(spec("FP32"), np.array([value]), [1])
        assert abs(value) > float(np.finfo(np.float32).max)
        return
    assert same(array, np.array([value]).astype(np.float32))
    assert same(from_numbers(spec("FP32"), np.array([value]), [1]), array)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_an_integer_is_a_number(datatype: str) -> None:
    array = from_json(spec(datatype), [1, -2, 3.5, 2**64], [4])
    assert array.tolist() == [1.0, -2.0, 3.5, 2.0**64]


WRONG: list[tuple[str, Any, str]] = [
    ("BOOL", 1, "the number 1; it takes booleans (BOOL)"),
    ("BOOL", 0, "the number 0; it takes booleans (BOOL)"),
    ("BOOL", "true", "the string 'true'; it takes booleans (BOOL)"),
    ("BOOL", None, "null; it takes booleans (BOOL)"),
    *((datatype, True, f"the boolean true; it takes integers ({datatype})") for datatype in INTEGERS),
    *((datatype, 1.0, f"the number 1.0; it takes integers ({datatype})") for datatype in INTEGERS),
    ("INT32", 1.5, "the number 1.5; it takes integers (INT32)"),
    ("INT32", "1", "the string '1'; it takes integers (INT32)"),
    ("INT32", None, "null; it takes integers (INT32)"),
    ("FP32", True, "the boolean true; it takes numbers (FP32)"),
    ("FP64", False, "the boolean false; it takes numbers (FP64)"),
    ("FP32", "1.5", "the string '1.5'; it takes numbers (FP32)"),
    ("FP64", None, "null; it takes numbers (FP64)"),
    ("FP32", {"a": 1}, 'the object {"a": 1}; it takes numbers (FP32)'),
    ("BYTES", 1, "the number 1; it takes strings (BYTES)"),
    ("BYTES", True, "the boolean true; it takes strings (BYTES)"),
    ("BYTES", None, "null; it takes strings (BYTES)"),
]
WRONG += [("UINT64", 1e18, "the number 1e+18; it takes integers (UINT64)")]
_GOOD: dict[str, Any] = {"BOOL": True, "BYTES": "a", "FP32": 0.5, "FP64": 0.5}


@pytest.mark.parametrize(("datatype", "value", "sentence"), WRONG)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_a_value_of_another_type_is_named_with_its_place(
    datatype: str, value: Any, sentence: str, nested: bool
) -> None:
    """Nothing is converted: 1 is not true, true is not 1, 1.0 is not an integer, "1" is not a number."""
    good = _GOOD.get(datatype, 7)
    data = [[good, good], [good, value]] if nested else [good, good, good, value]
    with pytest.raises(WrongType) as refused:
        from_json(spec(datatype), data, [2, 2])
    assert str(refused.value) == f"value 3 of input 'x' is {sentence}"


@pytest.mark.parametrize(
    ("data", "shape", "sentence"),
    [
        ([1, 2, 3], [2, 2], "has 3 values for shape [2, 2], which has 4; the model takes shape ["),
        ([1, 2, 3, 4, 5], [2, 2], "has 5 values for shape [2, 2], which has 4; the model takes shape ["),
        ([], [1], "has 0 values for shape [1], which has 1; the model takes shape ["),
        ([1], [0], "has 1 values for shape [0], which has 0; the model takes shape ["),
        ([], [], "has 0 values for shape [], which has 1; the model takes shape ["),
        ([[1, 2], [3]], [2, 2], "ragged data: not only lists of 2 at depth 2"),
        ([[1, 2], [3, 4, 5]], [2, 2], "ragged data: not only lists of 2 at depth 2"),
        ([[1, 2, 3], [4]], [2, 2], "ragged data: not only lists of 2 at depth 2"),
        ([[1, 2], 3], [2, 2], "ragged data"),
        ([1, [2, 3]], [2, 2], "ragged data: not only lists of 2 at depth 2"),
        ([1, 2, [3, 4]], [2, 2], "data that are not lists"),
        ([[1, 2]], [2, 2], "data that are not lists of 2 at depth 1"),
        ([[1, 2], [3, 4], [5, 6]], [2, 2], "data that are not lists of 2 at depth 1"),
        ([[1, 2, 3, 4]], [2, 2], "data that are not lists of 2 at depth 1"),
        ([[1], [2], [3], [4]], [2, 2], "data that are not lists of 2 at depth 1"),
        ([[[1, 2]], [[3, 4]]], [2, 2], "ragged data: not only lists of 2 at depth 2"),
        ([[1, 2], [3, 4]], [2, 1, 2], "ragged data: not only lists of 1 at depth 2"),
        ([[[1, 2]], [3, 4]], [2, 1, 2], "ragged data"),
        ([[], []], [2, 2], "ragged data"),
        ([[]], [0], "data that are not lists of 0 at depth 1"),
    ],
)
def test_data_fill_their_shape_flat_or_nested_as_it_says(data: list[Any], shape: list[int], sentence: str) -> None:
    """Neither ragged nor mixed; a list is never guessed to be another form of the same."""
    with pytest.raises(ShapeMismatch, match=re.escape(sentence)):
        from_json(spec("FP32"), data, shape)


@pytest.mark.parametrize(
    ("data", "shape"), [([[1, 2], [[3], 4]], [2, 2]), ([[1]], []), ([[[1, 2], [3, 4]]], [1, 2, 1]), ([[[1]]], [1])]
)
def test_lists_deeper_than_the_shape_are_refused(data: list[Any], shape: list[int]) -> None:
    with pytest.raises((WrongType, ShapeMismatch)):
        from_json(spec("FP32"), data, shape)


nestings = st.recursive(st.integers(-3, 3) | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=3))


@given(st.lists(nestings, max_size=4), st.lists(st.integers(0, 3), max_size=3))
def test_any_list_is_an_array_of_its_shape_or_a_refusal(data: list[Any], shape: list[int]) -> None:
    """And what is accepted is what NumPy, told the shape, makes of it."""
    try:
        array = from_json(spec("INT8"), data, shape)
    except RequestError:
        return
    assert array.shape == tuple(shape)
    assert array.tolist() == np.array(data, dtype=np.int8).reshape(shape).tolist()


def test_fp16_has_no_json_form() -> None:
    with pytest.raises(NeedsBinary, match="input 'x' is FP16, which has no JSON form; send its bytes after the JSON"):
        from_json(spec("FP16"), [1.0], [1])


@pytest.mark.parametrize("datatype", FIXED)
@pytest.mark.parametrize("change", [-1, 1])
def test_bytes_that_are_not_as_many_as_the_shape_takes_are_refused(datatype: str, change: int) -> None:
    wanted = 6 * DATATYPES[datatype].itemsize
    with pytest.raises(MalformedBinary) as refused:
        from_bytes(spec(datatype), memoryview(bytes(wanted + change)), [2, 3])
    assert str(refused.value) == (f"input 'x' has {wanted + change} bytes; {datatype} of shape [2, 3] takes {wanted}")


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_bool_is_0_or_1(byte: int) -> None:
    """Other bytes are no booleans to a processor either."""
    with pytest.raises(MalformedBinary, match=f"input 'x' is BOOL and has a byte {byte}; each is 0 or 1"):
        from_bytes(spec("BOOL"), memoryview(bytes([1, 0, byte])), [3])


@pytest.mark.parametrize(
    ("content", "count", "sentence"),
    [
        (b"\x01", 1, "element 0 of input 'x' ends at byte 4 of 1; each element is its length in four bytes"),
        (b"\x01\0\0\0a\x01\0", 2, "element 1 of input 'x' ends at byte 9 of 7"),
        (b"\x03\0\0\0ab", 1, "element 0 of input 'x' ends at byte 7 of 6"),
        (b"\xff\xff\xff\xffab", 1, "element 0 of input 'x' ends at byte 4294967299 of 6"),
        (b"\x02\0\0\0ab\x01\0\0\0", 2, "element 1 of input 'x' ends at byte 11 of 10"),
        (b"\x02\0\0\0ab", 2, "input 'x' has 1 elements; its shape takes 2"),
        (b"\x02\0\0\0ab\0\0\0\0", 1, "input 'x' has 2 elements; its shape takes 1"),
        (b"", 1, "input 'x' has 0 elements; its shape takes 1"),
        (b"\0\0\0\0", 0, "input 'x' has 1 elements; its shape takes 0"),
    ],
)
def test_strings_that_do_not_end_where_they_say_are_refused(content: bytes, count: int, sentence: str) -> None:
    with pytest.raises(MalformedBinary, match=re.escape(sentence)):
        from_bytes(spec("BYTES"), memoryview(content), [count])


@pytest.mark.parametrize(
    ("text", "position"), [(b"ab\xff", 2), (b"\xc3", 0), (b"a\xed\xa0\x80", 1), (b"\xc0\x80", 0), (b"\xf5", 0)]
)
def test_strings_are_text(text: bytes, position: int) -> None:
    """Surrogates, overlong forms and cut characters are not UTF-8, and string tensors of ONNX hold nothing else."""
    content = b"\0\0\0\0" + struct.pack("<I", len(text)) + text
    with pytest.raises(NotUtf8, match=f"an element of input 'x' is not UTF-8 from its byte {position} on"):
        from_bytes(spec("BYTES"), memoryview(content), [2])


@given(st.binary(max_size=40), st.integers(0, 4))
def test_any_bytes_are_strings_or_a_refusal(content: bytes, count: int) -> None:
    """And those that are strings are written as they came."""
    try:
        array = from_bytes(spec("BYTES"), memoryview(content), [count])
    except (MalformedBinary, NotUtf8):
        return
    assert array.shape == (count,)
    assert to_bytes(array) == content
