"""Binary tensors, good ones and damaged ones: each byte has one place, or the request is refused in words.

What an accepted message means is found a second time here, from the layout of the specification: JSON, then the bytes
of the binary tensors in the order in which they stand in it, little-endian, strings with their length before them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.errors import MalformedBinary
from service.prediction import JSON_LENGTH, _json_bytes
from service.protocol import v2
from service.repository import Live
from service.signature import DATATYPES, Accepted, TensorSpec
from tests.fuzzing import (
    AS_LONG_AS_IT_TAKES,
    NUMBERS,
    ONE_FAULT,
    TO_BYTES,
    TO_JSON,
    Changes,
    changed,
    changes,
    fuzzed,
    model,
)
from tests.service.test_fuzz_json import Read, by_bits, in_json, meaning, outcome, strictly

pytestmark = AS_LONG_AS_IT_TAKES

MODELS: dict[str, Live] = {
    "one": model({"x": ("FP32", [-1, 3])}),
    "every": model({datatype: (datatype, [-1, 2]) for datatype in DATATYPES}),  # type: ignore[misc]
    "strings": model({"s": ("BYTES", [-1]), "t": ("BYTES", [-1, 2])}),
    "word": model({"s": ("BYTES", [-1, 1])}),
    "halves": model({"h": ("FP16", [-1, -1]), "b": ("BOOL", [-1])}),
    "line": model({"x": ("FP64", [-1])}),
    "open": model({"x": ("INT16", [-1, 2, -1])}),
    "fixed": model({"x": ("INT32", [2, 3])}),
    "empty": model({"x": ("UINT8", [-1, -1])}),
}
RAW = [name for name in MODELS if len(MODELS[name].admitted.signature.inputs) == 1]

texts = st.sampled_from(["", "a", "ä", "\0", "\U0001f600", 'a"b:[{\\', "x" * 300])


def arrays(datatype: str, shape: list[int]) -> st.SearchStrategy[NDArray[Any]]:
    """Every value of the datatype, by its bits."""
    dtype, count = DATATYPES[datatype], int(np.prod(shape))
    if datatype == "BYTES":
        return st.lists(texts, min_size=count, max_size=count).map(
            lambda words: np.array(words, dtype=np.object_).reshape(shape)
        )
    if datatype == "BOOL":
        return st.lists(st.booleans(), min_size=count, max_size=count).map(lambda it: np.array(it, bool).reshape(shape))
    size = count * dtype.itemsize
    return st.binary(min_size=size, max_size=size).map(lambda bits: np.frombuffer(bits, dtype=dtype).reshape(shape))


def in_bytes(array: NDArray[Any]) -> bytes:
    """Written apart from the service."""
    if array.dtype != np.object_:
        return array.astype(array.dtype.newbyteorder("<")).tobytes()
    words = [word.encode() for word in array.reshape(-1).tolist()]
    return b"".join(len(word).to_bytes(4, "little") + word for word in words)


def of_bytes(spec: TensorSpec, content: bytes, shape: list[int]) -> NDArray[Any]:
    """Read apart from the service."""
    if spec.datatype != "BYTES":
        if spec.datatype == "BOOL":
            assert set(content) <= {0, 1}
        return np.frombuffer(content, dtype=spec.dtype.newbyteorder("<")).astype(spec.dtype).reshape(shape)
    words = []
    while content:
        size = int.from_bytes(content[:4], "little")
        assert len(content) >= 4 + size, "a string goes beyond its end"
        words.append(content[4 : 4 + size].decode())
        content = content[4 + size :]
    return np.array(words, dtype=np.object_).reshape(shape)


class Message(NamedTuple):
    """JSON, the bytes behind it, and the model that both are for."""

    name: str
    head: bytes
    blobs: bytes

    @property
    def live(self) -> Live:
        return MODELS[self.name]


@st.composite
def messages(draw: st.DrawFn, of: Sequence[str] = tuple(MODELS)) -> Message:
    """A good message for one of these models: its tensors in any order, in bytes or in JSON."""
    name = draw(st.sampled_from(of))
    signature = MODELS[name].admitted.signature
    rows = draw(st.integers(1, 3))
    tensors: list[dict[str, Any]] = []
    blobs = b""
    for spec in draw(st.permutations(signature.inputs)):
        shape = [axis if axis != -1 else draw(st.integers(0, 2)) for axis in spec.shape[1:]]
        shape = [rows if spec.shape[0] == -1 else spec.shape[0], *shape]
        array = draw(arrays(spec.datatype, shape))
        tensor: dict[str, Any] = {"name": spec.name, "shape": shape, "datatype": spec.datatype}
        plain = spec.datatype != "FP16" and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))
        if plain and draw(st.booleans()):
            tensor["data"] = array.reshape(-1).tolist()
        else:
            blob = in_bytes(array)
            tensor["parameters"] = {"binary_data_size": len(blob)}
            blobs += blob
        tensors.append(tensor)
    half = any(spec.datatype == "FP16" for spec in signature.outputs)
    more = {"parameters": {"binary_data_output": True}} if half or draw(st.booleans()) else {}
    head = json.dumps({"inputs": tensors, **more}) + " " * draw(st.integers(0, 7))
    return Message(name, head.encode(), blobs)


_SIZE = re.compile(rb'"binary_data_size": (-?\d+)')


def change_a_size(head: bytes, a: int, b: int) -> bytes:
    """By a little, or to a number that nobody means."""
    if not (sizes := list(_SIZE.finditer(head))):
        return head
    size = sizes[a % len(sizes)]
    to = str(int(size[1]) + b % 9 - 4) if b % 3 else NUMBERS[b % len(NUMBERS)]
    return head[: size.start(1)] + to.encode() + head[size.end(1) :]


def resize(message: Message, a: int, b: int) -> Message:
    """More or fewer bytes for a binary tensor, as the JSON says."""
    sizes = list(_SIZE.finditer(message.head))
    if not sizes:
        return message
    i = a % len(sizes)
    end = sum(int(size[1]) for size in sizes[: i + 1])
    size = int(sizes[i][1])
    gone = min(b % 5, size)
    more = (b"", b"\0\0\0\0", b"\1\0\0\0a", b"\2", b"\xff" * 4)[b // 5 % 5]
    head = message.head[: sizes[i].start(1)] + b"%d" % (size - gone + len(more)) + message.head[sizes[i].end(1) :]
    return Message(message.name, head, message.blobs[: end - gone] + more + message.blobs[end:])


def say_data_too(message: Message, a: int, b: int) -> Message:
    """Beside the size of a binary tensor."""
    data = (b"[]", b"null", b"[1]", b"{}", b"[1, 2, 3]")[b % 5]
    head = message.head.replace(
        b'"parameters": {"binary_data_size"', b'"data": %b, "parameters": {"binary_data_size"' % data
    )
    return message._replace(head=head)


def change_a_byte(message: Message, a: int, b: int) -> Message:
    """Often one of the first, where lengths of strings are."""
    if not message.blobs:
        return message
    at = a // 2 % (8 if a % 2 else len(message.blobs)) % len(message.blobs)
    return message._replace(blobs=message.blobs[:at] + bytes([b % 256]) + message.blobs[at + 1 :])


def add_bytes(message: Message, a: int, b: int) -> Message:
    return message._replace(blobs=message.blobs + bytes(b % 5))


def lose_bytes(message: Message, a: int, b: int) -> Message:
    return message._replace(blobs=message.blobs[: -1 - b % 5])


def say_another_size(message: Message, a: int, b: int) -> Message:
    return message._replace(head=change_a_size(message.head, a, b))


def change_the_json(message: Message, a: int, b: int) -> Message:
    return message._replace(head=ONE_FAULT[a // 16 % len(ONE_FAULT)](message.head, a, b))


FAULTS = (resize, resize, say_data_too, change_a_byte, add_bytes, lose_bytes, say_another_size, change_the_json)


def faults(seed: int) -> tuple[Callable[[Message, int, int], Message], int, int]:
    generator = random.Random(seed)
    return generator.choice(FAULTS), generator.randrange(2**20), generator.randrange(2**20)


def of_all_readers(live: Live, body: bytes, json_bytes: int | None) -> Any:
    careful = outcome(live, body, "careful", json_bytes)
    assert outcome(live, body, "quick", json_bytes) == careful
    assert outcome(live, body, "large", json_bytes) == careful
    shifted = memoryview(b"\0" + body)[1:]  # as a body lies where it was read: somewhere
    assert outcome(live, shifted, "quick", json_bytes) == careful
    return careful


def check_meaning(live: Live, body: bytes, json_bytes: int | None, read: Read) -> None:
    if json_bytes == 0:
        (spec,) = live.admitted.signature.inputs
        ((_, shape, bits),) = read.tensors
        assert len(shape) == len(spec.shape)
        assert all(want in (-1, got) for want, got in zip(spec.shape, shape, strict=True))
        assert bits == (
            np.array([body.decode()], dtype=np.object_).reshape(shape).tolist() if spec.dtype.kind == "O" else body
        )
        assert read.rows == max(spec.shape[0], 1)
        assert all(wanted.binary for wanted in read.outputs)
        return
    said = strictly(body[:json_bytes])
    left = b"" if json_bytes is None else body[json_bytes:]
    blobs: dict[str, bytes] = {}
    for tensor in said["inputs"]:
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        if size is not None:
            assert tensor.get("data") is None
            assert type(size) is int
            assert 0 <= size <= len(left)
            blobs[tensor["name"]], left = left[:size], left[size:]
    assert not left, "bytes are left over"

    def elements(spec: Any, tensor: Any, shape: list[int]) -> NDArray[Any]:
        return of_bytes(spec, blobs[spec.name], shape) if spec.name in blobs else in_json(spec, tensor, shape)

    assert read == meaning(live, said, elements)
    assert read.rows <= max(v2.MAX_EMPTY, len(body))


@fuzzed(120)
@given(messages())
def test_a_good_message_means_what_it_says(message: Message) -> None:
    body, json_bytes = message.head + message.blobs, len(message.head)
    read = of_all_readers(message.live, body, json_bytes)
    assert isinstance(read, Read), read
    check_meaning(message.live, body, json_bytes, read)


@pytest.mark.parametrize("name", MODELS)
@fuzzed(30)
@given(st.data(), st.lists(st.integers(0, 2**24 - 1).map(faults), min_size=8, max_size=8))
def test_one_fault_in_a_message_is_found_by_all_readers(name: str, data: st.DataObject, each: list[Any]) -> None:
    """For every model: bytes too few, too many or elsewhere, strings that end elsewhere, a BOOL that is 2, data too."""
    good = data.draw(messages([name]))
    for change, a, b in each:
        message = change(good, a, b)
        body, json_bytes = message.head + message.blobs, len(message.head)
        read = of_all_readers(message.live, body, json_bytes)
        if isinstance(read, Read):
            check_meaning(message.live, body, json_bytes, read)


@fuzzed(100)
@given(
    messages(),
    st.lists(
        st.tuples(
            changes((change_a_size, change_a_size, change_a_size, *TO_JSON), most=1) | st.just([]),
            changes(TO_BYTES) | st.just([]),
            st.sampled_from([0] * 12 + [1, -1, 4, -7, 40]),
        ),
        min_size=6,
        max_size=6,
    ),
)
def test_a_damaged_message_is_judged_alike_and_never_misread(
    message: Message, each: list[tuple[Changes, Changes, int]]
) -> None:
    """Sizes, shapes, the length of the JSON and lengths of strings that do not agree, bytes lost and doubled: each is
    used once, by the tensor that says so, or the message is refused in the same words by all readers."""
    for to_head, to_blobs, shift in each:
        head = changed(message.head, to_head)
        body = head + changed(message.blobs, to_blobs)
        json_bytes = min(max(len(head) + shift, 0), len(body))
        read = of_all_readers(message.live, body, json_bytes)
        if isinstance(read, Read):
            check_meaning(message.live, body, json_bytes, read)


@fuzzed(60)
@given(messages(), st.integers(0, 2**20))
def test_any_other_length_of_the_json_is_judged_alike(message: Message, place: int) -> None:
    """None among them, for a body of which not all is JSON."""
    body = message.head + message.blobs
    for json_bytes in (None, place % (len(body) + 1)):
        read = of_all_readers(message.live, body, json_bytes)
        if isinstance(read, Read):
            check_meaning(message.live, body, json_bytes, read)


@fuzzed(80)
@given(st.sampled_from(list(MODELS)), st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_a_raw_request_is_its_bytes_or_is_refused(name: str, body: bytes) -> None:
    read = of_all_readers(MODELS[name], body, 0)
    if isinstance(read, Read):
        assert name in RAW
        check_meaning(MODELS[name], body, 0, read)


@fuzzed(60)
@given(st.sampled_from(RAW), st.integers(0, 3), st.data())
def test_a_raw_request_of_the_right_size_is_taken(name: str, length: int, data: st.DataObject) -> None:
    live = MODELS[name]
    (spec,) = live.admitted.signature.inputs
    shape = [max(spec.shape[0], 1), *(length if axis == -1 else axis for axis in spec.shape[1:])]
    array = data.draw(arrays(spec.datatype, shape))
    body = str(array.item()).encode() if spec.datatype == "BYTES" else in_bytes(array)
    read = of_all_readers(live, body, 0)
    assert isinstance(read, Read), read
    assert read.tensors == [by_bits(array)]


@fuzzed(100)
@given(st.binary(max_size=14) | st.from_regex(rb"[-+ ]?[0-9]{1,22}[.e_]?[0-9]?", fullmatch=True), st.integers(0, 2**33))
def test_the_header_with_the_length_is_a_number_of_bytes_that_are_there(value: bytes, size: int) -> None:
    """Or it is refused: no sign, no space, nothing but ASCII digits."""
    try:
        json_bytes = _json_bytes({JSON_LENGTH: value}, size)
    except MalformedBinary:
        assert not re.fullmatch(rb"[0-9]{1,10}", value) or int(value) > size
        return
    assert json_bytes is not None
    assert re.fullmatch(rb"[0-9]+", value)
    assert json_bytes == int(value) <= size


# Answers


class Answered(NamedTuple):
    """What a model gave, and how it is asked for."""

    outputs: list[NDArray[Any]]
    wanted: tuple[v2.Wanted, ...]
    batched: bool


@st.composite
def answers(draw: st.DrawFn) -> Answered:
    batched = draw(st.booleans())
    rows = draw(st.integers(1, 3)) if batched else 1
    outputs = [draw(arrays(datatype, [rows, 2])) for datatype in DATATYPES]
    positions = draw(st.permutations(range(len(DATATYPES))))[: draw(st.integers(1, len(DATATYPES)))]
    half = list(DATATYPES).index("FP16")
    wanted = tuple(v2.Wanted(i, i == half or draw(st.booleans())) for i in positions)
    return Answered(outputs, wanted, batched)


@fuzzed(60)
@given(answers())
def test_an_answer_has_every_bit_of_what_the_model_gave(answered: Answered) -> None:
    """In bytes all of them; in JSON all that JSON can say. Sent back as a request, it is the same tensors again."""
    outputs, wanted, batched = answered
    specs = MODELS["every"].admitted.signature.outputs
    request = v2.InferRequest(MODELS["every"], Accepted((), 1), wanted, batched, "7")
    body, json_bytes = request.render(outputs)
    assert (json_bytes is not None) == any(one.binary for one in wanted)
    said = strictly(body[:json_bytes])
    left = b"" if json_bytes is None else body[json_bytes:]
    assert (said["model_name"], said["model_version"], said["id"]) == ("m", "1", "7")
    for (position, binary), output in zip(wanted, said["outputs"], strict=True):
        spec, array = specs[position], outputs[position] if batched else outputs[position][0]
        assert (output["name"], output["datatype"], output["shape"]) == (spec.name, spec.datatype, list(array.shape))
        assert ("data" in output, "parameters" in output) == (not binary, binary)
        if binary:
            size = output["parameters"]["binary_data_size"]
            blob, left = left[:size], left[size:]
            assert by_bits(of_bytes(spec, blob, output["shape"])) == by_bits(array)
        else:
            finite = array if array.dtype.kind != "f" else np.where(np.isfinite(array), array, array.dtype.type(0))
            data = [0 if value is None else value for value in output["data"]]
            assert by_bits(np.array(data, dtype=spec.dtype).reshape(array.shape)) == by_bits(finite)
            nulls = [value is None for value in output["data"]]
            assert nulls == (array != finite).reshape(-1).tolist()
    assert not left
    if any(None in output.get("data", []) for output in said["outputs"]):
        return
    mirror = model(
        {specs[i].name: (specs[i].datatype, list(specs[i].shape)) for i, _ in wanted},
        {"y": ("FP32", [-1, 1])},
    )
    head = json.dumps({"inputs": said["outputs"]}).encode()
    read = outcome(mirror, head + (b"" if json_bytes is None else body[json_bytes:]), "quick", len(head))
    assert isinstance(read, Read), read
    assert read.tensors == [by_bits(outputs[i]) for i, _ in wanted]
