"""Inference requests in JSON, good ones and damaged ones: the three readers are one, and right, or refuse in words.

Small requests as most callers write them are read in one go, large ones by another parser, and the rest carefully. What
an accepted request means is found a second time here, by Python's own parser and NumPy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.errors import BadRequest
from service.protocol import Body, v2
from service.protocol.json import error_body
from service.protocol.large_json import parsed_large
from service.repository import Live
from service.signature import DATATYPES
from tests.fuzzing import AS_LONG_AS_IT_TAKES, ONE_FAULT, TO_JSON, Changes, changed, changes, fuzzed, model

pytestmark = AS_LONG_AS_IT_TAKES

MODELS: dict[str, Live] = {
    "one": model({"x": ("FP32", [-1, 3])}),
    "two": model({"a": ("FP32", [-1, 2]), "b": ("FP32", [-1, 2, 2])}),
    "colon": model({"serving_x:0": ("FP32", [-1, 2])}),
    "numbers": model({"i": ("INT64", [-1, 2]), "j": ("INT32", [-1]), "u": ("UINT64", [-1, 2]), "d": ("FP64", [-1, 2])}),
    "short": model({"a": ("INT8", [-1, 2]), "b": ("UINT8", [-1]), "c": ("INT16", [-1]), "d": ("UINT16", [-1])}),
    "long": model({"u": ("UINT32", [-1, -1]), "f": ("FP32", [-1, -1])}),
    "words": model({"s": ("BYTES", [-1, 2]), "t": ("BOOL", [-1, 2])}),
    "open": model({"x": ("FP32", [-1, -1, -1])}),
    "integers": model({"x": ("INT64", [-1, -1])}),
    "fixed": model({"x": ("FP64", [2, 3])}),
    "half": model({"x": ("FP32", [-1, 2]), "h": ("FP16", [-1, 2])}),
    "half out": model({"x": ("FP32", [-1, 2])}, {"y": ("FP16", [-1, 2]), "z": ("FP32", [-1, 2])}),
}

IN_JSON = [name for name in MODELS if name not in ("half", "half out")]

FLOATS = ["0", "-0", "-0.0", "0.1", "1E+2", "1e-400", "5e-324", "1e-45", "7.1e-46", "9007199254740993", "16777217"]
FLOATS += ["18446744073709551615", "-9223372036854775808", "0.30000000000000004", "3.40282356e38", "1.17549435082e-38"]
FLOATS += ["-2.5", "41", "5.5", "123456.789", "1e-7", "0.333333343267440796", "8.5e37", "18446744073709551616", "1E5"]
FLOATS += ["0." + "1" * 60, "-1e-40", "3.4028235677973362e38", "100000000000000000000000000"]
TEXTS = ['""', '"a"', '"ä"', '"\\u00e4"', '"a:b[{"', '"\\"\\\\"', '"\\ud83d\\ude00"', '"\\u0000"', '"\U0001f600"']


def tokens(datatype: str) -> list[str]:
    """What the datatype holds, as JSON writes it."""
    dtype = DATATYPES[datatype]
    match dtype.kind:
        case "f":
            return FLOATS
        case "O":
            return TEXTS
        case "b":
            return ["true", "false"]
        case _:
            info = np.iinfo(dtype)
            near = [2**53 + 1, 2**31, 255, 128, 7, 1, 0, -1, -128, -(2**53) - 1, int(info.min), int(info.max)]
            return ["-0", *(str(value) for value in near if info.min <= value <= info.max)]


class Asked(NamedTuple):
    """A request, and the model that it is for."""

    name: str
    text: str

    @property
    def live(self) -> Live:
        return MODELS[self.name]


IDS = ["", '"id": "7"', '"id": ""', '"id": null', '"id": "a:b[{"', '"id": "\\u003a ä"', '"\\u0069d": "7"']
PARAMETERS = ["", '"parameters": {}', '"parameters": null', '"parameters": {"a:": "[[", "b": 1.5, "c": true}']
ASIDE = [*PARAMETERS, '"parameters": {"timeout": 5}', '"parameters": {"binary_data_output": true, "timeout": 0}']
ASIDE += ['"other": [[1, {"a": [":"]}], ["["]]', '"n": {"a": {}}']
OUTPUTS = ['"outputs": null', '"outputs": []', '"outputs": [%s]', '"outputs": [%s]', '"parameters": {}', '"u": {}']


@st.composite
def requests(draw: st.DrawFn, of: Sequence[str] = IN_JSON, *, fewest_rows: int = 1) -> Asked:
    """A request in one of many spellings, for one of these models; a good one if it has rows."""
    name = draw(st.sampled_from(of))
    signature = MODELS[name].admitted.signature
    style = draw(st.sampled_from([0, 0, 1, 2, 3]))  # 0: as most callers write it
    joint = ", " if style < 2 else draw(st.sampled_from([",", " ,\n", ",\t"]))
    rows = draw(st.integers(fewest_rows, 3))
    batched = style == 0 or draw(st.integers(0, 4)) > 0 or any(spec.shape[0] != -1 for spec in signature.inputs)
    tensors = []
    for spec in signature.inputs:
        shape = [axis if axis != -1 else draw(st.integers(0, 3)) for axis in spec.shape[1:]]
        if batched:
            shape = [rows if spec.shape[0] == -1 else spec.shape[0], *shape]
        count = int(np.prod(shape))
        data = draw(st.lists(st.sampled_from(tokens(spec.datatype)), min_size=count, max_size=count))
        nested = style > 0 and count > 0 and draw(st.booleans())
        parts = [
            f'"name": "{spec.name}"',
            f'"shape": {shape}',
            f'"datatype": "{spec.datatype}"',
            f'"data": {written(shape if nested else [count], data, joint)}',
        ]
        if style > 1:
            parts = [part for part in [*draw(st.permutations(parts)), draw(st.sampled_from(PARAMETERS))] if part]
        tensors.append("{" + joint.join(parts) + "}")
    if style > 0:
        tensors = draw(st.permutations(tensors))
    parts = [f'"inputs": [{joint.join(tensors)}]']
    if style < 2:
        parts += [draw(st.sampled_from(IDS[:2]))]
    else:
        parts += [draw(st.sampled_from(IDS)), draw(st.sampled_from(ASIDE))]
        asked = draw(st.sampled_from(OUTPUTS))
        if asked.split(":")[0] not in parts[-1]:
            parts.append(asked.replace("%s", joint.join(_outputs(draw, MODELS[name]))))
        parts = draw(st.permutations(parts))
    return Asked(name, "{" + joint.join(part for part in parts if part) + "}")


def _outputs(draw: st.DrawFn, live: Live) -> list[str]:
    names = draw(st.permutations([spec.name for spec in live.admitted.signature.outputs]))
    more = st.sampled_from(["", *(f', "parameters": {{"binary_data": {flag}, "x": 1}}' for flag in ("true", "false"))])
    return [f'{{"name": "{name}"{draw(more)}}}' for name in names[: draw(st.integers(1, 4))]]


def written(shape: list[int], data: list[str], joint: str) -> str:
    """Elements as JSON, nested as the shape says."""
    if len(shape) <= 1:
        return f"[{joint.join(data)}]"
    step = len(data) // shape[0]
    return f"[{joint.join(written(shape[1:], data[i * step : (i + 1) * step], joint) for i in range(shape[0]))}]"


# Three readers

Reader = Literal["quick", "careful", "large"]


class Read(NamedTuple):
    """All that came of a request, numbers by their bits."""

    tensors: list[tuple[object, tuple[int, ...], object]]
    rows: int
    batched: bool
    outputs: tuple[v2.Wanted, ...]
    id: str | None
    timeout_s: float | None


class Refused(NamedTuple):
    code: str
    sentence: str


def outcome(live: Live, body: Body, reader: Reader, json_bytes: int | None = None) -> Read | Refused:
    """What one of the readers makes of a body; any exception but a refusal fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2, "LARGE_BYTES", 0 if reader == "large" else sys.maxsize)
        if reader != "quick":
            patch.setattr(v2, "_plain", lambda *_: None)
        try:
            request = v2.parse(live, body, json_bytes)
        except BadRequest as refused:
            return in_words(refused)
    every = tuple(v2.Wanted(i, False) for i in range(len(live.admitted.signature.outputs)))
    return Read(
        [by_bits(array) for array in request.accepted.tensors],
        request.accepted.rows,
        request.batched,
        every if request.outputs is None else request.outputs,
        request.id,
        request.timeout_s,
    )


def in_words(refused: BadRequest) -> Refused:
    """As the caller reads it."""
    said = json.loads(error_body(refused))
    assert len(said["error"]) < 5000
    return Refused(said["code"], said["error"])


def by_bits(array: NDArray[Any]) -> tuple[object, tuple[int, ...], object]:
    return array.dtype, array.shape, array.tolist() if array.dtype == np.object_ else array.tobytes()


def of_all_readers(live: Live, body: bytes) -> Read | Refused:
    """What all three make of it."""
    careful = outcome(live, body, "careful")
    assert outcome(live, body, "quick") == careful
    assert outcome(live, body, "large") == careful
    with_length = outcome(live, memoryview(body), "quick", len(body)) if body else careful
    assert with_length == careful
    return careful


# What it means, found apart from the service


def strictly(text: bytes) -> Any:
    """By Python's parser, without what it adds to JSON: NaN, and keys that are there twice."""

    def constant(name: str) -> None:
        raise ValueError(name)

    def pairs(of: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(of)) == len(of), "a key is there twice"
        return dict(of)

    return json.loads(text.decode(), parse_constant=constant, object_pairs_hook=pairs)


def meaning(live: Live, said: Any, elements: Callable[[Any, Any, list[int]], NDArray[Any]]) -> Read:
    """An accepted request by the words of the protocol.

    Args:
        elements: of a tensor's specification, what was said of it, and its shape, makes an array.
    """
    signature = live.admitted.signature
    tensors = {tensor["name"]: tensor for tensor in said["inputs"]}
    assert len(tensors) == len(said["inputs"]), "an input is there twice"
    assert tensors.keys() == {spec.name for spec in signature.inputs}
    arrays = [elements(spec, tensors[spec.name], tensors[spec.name]["shape"]) for spec in signature.inputs]
    batched = len(tensors[signature.inputs[0].name]["shape"]) == len(signature.inputs[0].shape)
    if not batched:
        arrays = [array[np.newaxis] for array in arrays]
    for spec, array in zip(signature.inputs, arrays, strict=True):
        scalars(tensors[spec.name])
        assert tensors[spec.name]["datatype"] == spec.datatype
        assert len(array.shape) == len(spec.shape)
        assert all(want in (-1, got) for want, got in zip(spec.shape, array.shape, strict=True))
    rows = {array.shape[0] for array in arrays}
    assert len(rows) == 1
    parameters = scalars(said)
    names = [spec.name for spec in signature.outputs]
    asked = said.get("outputs")
    wanted = [
        v2.Wanted(
            names.index(one["name"]),
            scalars(one).get("binary_data", parameters.get("binary_data_output", False)),
        )
        for one in ([{"name": name} for name in names] if asked is None else asked)
    ]
    assert all(type(one.binary) is bool for one in wanted)
    identifier = said.get("id")
    assert identifier is None or type(identifier) is str
    timeout_us = parameters.get("timeout", 0)
    assert type(timeout_us) is int
    return Read(
        [by_bits(array) for array in arrays],
        rows.pop(),
        batched,
        tuple(wanted),
        identifier,
        timeout_us / 1e6 or None,
    )


def scalars(owner: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a request, an input or an output, checked."""
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    assert all(type(value) in (str, int, float, bool) for value in parameters.values())
    return dict(parameters)


def in_json(spec: Any, tensor: Any, shape: list[int]) -> NDArray[Any]:
    """What NumPy makes of the values: floats are the nearest of their kind, by way of float64; integers themselves."""
    data = tensor.get("data")
    if data is None:  # of no bytes at all
        assert tensor["parameters"]["binary_data_size"] == 0
        return np.zeros(shape, dtype=spec.dtype)
    if data and type(data[0]) is list:
        assert nesting(data) == shape
    while any(type(item) is list for item in data):
        assert len({len(item) for item in data}) == 1, "ragged"
        data = list(chain.from_iterable(data))
    assert len(data) == np.prod(shape)
    assert all(type(axis) is int and axis >= 0 for axis in shape)
    kinds = set(map(type, data))
    match spec.dtype.kind:
        case "f":
            assert kinds <= {int, float}
            array = np.array([float(value) for value in data], dtype=np.float64).astype(spec.dtype)
            assert np.isfinite(array).all()
        case "b":
            assert kinds <= {bool}
            array = np.array(data, dtype=np.bool_)
        case "O":
            assert kinds <= {str}
            array = np.array(data, dtype=np.object_)
        case _:
            assert kinds <= {int}
            array = np.array(data, dtype=spec.dtype)
            assert array.tolist() == data, "an integer wrapped"
    return array.reshape(shape)


def nesting(data: Any) -> list[int]:
    return [len(data), *nesting(data[0])] if type(data) is list and data else [0] if type(data) is list else []


def check_meaning(live: Live, body: bytes, read: Read) -> None:
    assert read == meaning(live, strictly(body), in_json)
    grown = sum(len(bits) for _, _, bits in read.tensors if isinstance(bits, bytes))
    assert grown <= 8 * len(body), "a few bytes became many"
    assert read.rows <= max(v2.MAX_EMPTY, len(body))


@fuzzed(150)
@given(requests())
def test_a_good_request_is_read_by_all_readers_and_means_what_it_says(asked: Asked) -> None:
    body = asked.text.encode()
    read = of_all_readers(asked.live, body)
    assert isinstance(read, Read), read
    check_meaning(asked.live, body, read)


@pytest.mark.parametrize("name", IN_JSON)
@fuzzed(40)
@given(st.data(), st.lists(changes(ONE_FAULT, most=1), min_size=9, max_size=9))
def test_one_fault_in_a_request_is_found_by_all_readers(name: str, data: st.DataObject, each: list[Changes]) -> None:
    """For every model: no rows, a key twice or missing, a value or a shape of another type, a ragged list."""
    asked = data.draw(requests([name], fewest_rows=0))
    for made in ([], *each):
        body = changed(asked.text.encode(), made)
        read = of_all_readers(asked.live, body)
        if isinstance(read, Read):
            check_meaning(asked.live, body, read)


@fuzzed(200)
@given(requests(), st.lists(changes(TO_JSON), min_size=6, max_size=6))
def test_a_damaged_request_is_judged_alike_by_all_readers_and_never_misread(asked: Asked, each: list[Changes]) -> None:
    """Numbers and values that nobody means, keys twice, missing, misspelt or escaped, deep nests, bytes that are no
    text: the same tensors, outputs, id and timeout, those of Python's own parser, or a refusal in the same words."""
    for made in each:
        body = changed(asked.text.encode(), made)
        read = of_all_readers(asked.live, body)
        if isinstance(read, Read):
            check_meaning(asked.live, body, read)


@fuzzed(100)
@given(requests(), st.sampled_from(list(MODELS)), changes(TO_JSON, most=1) | st.just([]))
def test_a_request_for_another_model_is_judged_alike(asked: Asked, other: str, made: Changes) -> None:
    """As it was meant for this one, or refused."""
    body = changed(asked.text.encode(), made)
    read = of_all_readers(MODELS[other], body)
    if isinstance(read, Read):
        check_meaning(MODELS[other], body, read)


@fuzzed(80)
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode), st.sampled_from(list(MODELS)))
def test_anything_is_judged_alike(body: bytes, name: str) -> None:
    of_all_readers(MODELS[name], body)


def test_each_reader_is_tried() -> None:
    """Else the comparison would be of one reader with itself."""
    plain = '{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}'
    taken = {"quick": 0, "large": 0}
    live = MODELS["one"]
    kinds = {"x": "f"}
    for text in (plain, plain.replace("[1, 2, 3]", "[[1, 2, 3]]")):
        taken["quick"] += v2._plain(live, text.encode(), json.loads(text)) is not None
        taken["large"] += parsed_large(text.encode(), kinds) is not None
    assert taken == {"quick": 1, "large": 2}
