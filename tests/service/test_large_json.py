"""The quick way for large requests takes nothing that the ordinary way refuses, and makes the same tensors."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.errors import RequestError
from service.protocol import json as json_module
from service.protocol import large_json, v2
from service.protocol.json import count
from service.protocol.large_json import LARGE_BYTES, parsed_large
from service.repository import Live
from service.signature import DATATYPES, Signature

NUMERIC = [datatype for datatype in DATATYPES if datatype not in ("BOOL", "FP16", "BYTES")]
ORDINARY, QUICK = 2**60, 0


def live(*inputs: tuple[str, str, int]) -> Live:
    """A model of these inputs: each a name, a datatype and a number of axes of any length."""
    specs = [{"name": name, "datatype": datatype, "shape": [-1] * axes} for name, datatype, axes in inputs]
    signature = Signature.model_validate({"inputs": specs, "outputs": [{**specs[0], "name": "y"}]})
    model: Any = SimpleNamespace(name="m", version="1", admitted=SimpleNamespace(signature=signature))
    return model  # type: ignore[no-any-return]  # as much of a Live as parsing looks at


def outcome(model: Live, body: bytes, large_bytes: int, *, pieces: bool = False) -> tuple[object, ...]:
    """Everything that parsing says of a body, with numbers by their bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2, "LARGE_BYTES", large_bytes)
        patch.setattr(large_json, "CUT_BYTES", 0 if pieces else ORDINARY)
        patch.setattr(large_json, "_PIECE_BYTES", 4)
        try:
            request = v2.parse(model, body)
        except RequestError as refused:
            return type(refused), str(refused)
    tensors = [
        (array.dtype, array.shape, array.tolist() if array.dtype == np.object_ else array.tobytes())
        for array in request.accepted.tensors
    ]
    wanted = request.outputs if request.outputs is not None else (v2.Wanted(0, False),)
    return tensors, request.accepted.rows, request.batched, wanted, request.id, request.timeout_s


def taken(model: Live, body: bytes) -> bool:
    """Whether the quick way gave tensors rather than giving the body back."""
    kinds = {spec.name: spec.dtype.kind for spec in model.admitted.signature.inputs}
    return parsed_large(body, kinds) is not None


def written(shape: list[int], tokens: list[str], *, nested: bool) -> str:
    """Numbers as JSON, flat or nested as the shape says."""
    if not nested or len(shape) <= 1:
        return f"[{', '.join(tokens)}]"
    step = len(tokens) // max(shape[0], 1)
    parts = [written(shape[1:], tokens[i * step : (i + 1) * step], nested=True) for i in range(shape[0])]
    return f"[{','.join(parts)}]"


def body_of(datatype: str, shape: list[int], data: str, *, more: str = "") -> str:
    return f'{{"inputs": [{{"name": "x", "shape": {shape}, "datatype": "{datatype}", "data": {data}}}]{more}}}'


def good_tokens(datatype: str) -> st.SearchStrategy[str]:
    """Numbers that the datatype holds, as different writers write them."""
    dtype = DATATYPES[datatype]
    if dtype.kind == "f":
        floats = st.floats(width=64 if datatype == "FP64" else 32, allow_nan=False, allow_infinity=False)
        odd = ["-0", "-0.0", "1E+2", "1e-400", "5e-324", "0.1", "9007199254740993", "18446744073709551615", "1e-45"]
        odd += ["-9223372036854775808", "0.30000000000000004", "3.40282356e38", "1.17549435082e-38"]
        return floats.map(repr) | st.integers(-(2**63), 2**64 - 1).map(str) | st.sampled_from(odd)
    info = np.iinfo(dtype)
    ends = [int(info.min), int(info.max)]
    return (st.integers(*ends) | st.sampled_from(ends)).map(str)


WILD = [
    "true",
    "null",
    '"1"',
    "1.0",
    "1e2",
    "-1",
    "256",
    "1e39",
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "[1]",
    "[]",
    "{}",
]
WILD += [
    "18446744073709551616",
    "9223372036854775808",
    "-9223372036854775809",
    "9" * 400,
    "9" * 5000,
    "01",
    "+1",
    "1.",
    "",
]
WILD += ['"["', '"]:"', '{"data": [1]}', '"\\u005b"', "[[2]]", "[1, 2]", "0x1", "1_0", "'1'"]


@st.composite
def requests(draw: st.DrawFn, *, wild: bool) -> tuple[Live, str]:
    """A model of one input and a request for it; a wild one has a fault here and there."""
    datatype = draw(st.sampled_from(NUMERIC))
    shape = draw(st.lists(st.integers(0 if wild else 1, 4), min_size=1, max_size=3))
    tokens = good_tokens(datatype)
    count = int(np.prod(shape))
    data = draw(st.lists(tokens, min_size=count, max_size=count))
    if wild:
        for place in draw(st.lists(st.integers(0, max(count - 1, 0)), max_size=2)):
            data[place : place + draw(st.integers(0, 1))] = [draw(st.sampled_from(WILD))]
    return live(("x", datatype, len(shape))), body_of(
        datatype,
        draw(st.permutations(shape)) if wild else shape,
        written(shape, data, nested=draw(st.booleans())),
        more=draw(st.sampled_from(MORE)),
    )


MORE = [
    "",
    ', "id": "7"',
    ', "id": "a[b]:c"',
    ', "parameters": {"timeout": 5, "a:": "[["}',
    ', "outputs": [{"name": "y"}]',
]
MORE += [', "id": "\\u005b"', ', "other": [[1, {"a": [":"]}], ["["]]', ', "outputs": [{"name": "y", "parameters": {}}]']


@settings(max_examples=100)
@given(requests(wild=False))
def test_a_good_request_has_the_same_tensors_by_either_way(request_: tuple[Live, str]) -> None:
    """Bit for bit: integers in float tensors, ends of int64 and uint64, denormals, both zeros."""
    model, text = request_
    ordinary = outcome(model, text.encode(), ORDINARY)
    assert isinstance(ordinary[0], list), "the request was meant to be good"
    assert outcome(model, text.encode(), QUICK) == ordinary
    assert outcome(model, text.encode(), QUICK, pieces=True) == ordinary


@settings(max_examples=150)
@given(requests(wild=True))
def test_a_request_with_a_fault_is_refused_in_the_same_words(request_: tuple[Live, str]) -> None:
    model, text = request_
    assert outcome(model, text.encode(), QUICK) == outcome(model, text.encode(), ORDINARY)
    assert outcome(model, text.encode(), QUICK, pieces=True) == outcome(model, text.encode(), ORDINARY)


PIECES = [
    b"",
    b"[",
    b"]",
    b"{",
    b"}",
    b":",
    b",",
    b'"',
    b"\\",
    b"0",
    b"-",
    b".",
    b"e",
    b" ",
    b"\n",
    b"\0",
    b"\xff",
    b"\x80",
]
PIECES += [
    b'"data": [1],',
    b'"shape": [1],',
    b'"name": "x",',
    b'"inputs": [],',
    b'"id": "1",',
    b"[]",
    b"{}",
    b'"":0,',
    b"1,",
]
PIECES += [b"\xef\xbb\xbf", b"\xc3\xa4", b"true", b"null", b"/**/", b"NaN"]


@settings(max_examples=200)
@given(requests(wild=False), st.data())
def test_a_damaged_request_is_judged_alike(request_: tuple[Live, str], data: st.DataObject) -> None:
    """Bits turned, ends cut off, brackets, colons and whole keys put in: the same tensors or the same words."""
    model, text = request_
    body = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body)))
        match data.draw(st.sampled_from(["insert", "insert", "replace", "flip", "cut", "drop"])):
            case "insert":
                body[place:place] = data.draw(st.sampled_from(PIECES))
            case "replace":
                body[place : place + 1] = data.draw(st.sampled_from(PIECES))
            case "flip" if place < len(body):
                body[place] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del body[place:]
            case _:
                del body[place : place + data.draw(st.integers(1, 5))]
    assert outcome(model, bytes(body), QUICK) == outcome(model, bytes(body), ORDINARY)


@settings(max_examples=60)
@given(st.text(max_size=4), st.text(max_size=4), st.data())
def test_a_key_twice_is_found_wherever_it_is(key: str, other: str, data: st.DataObject) -> None:
    """Whatever the keys are called, and however they are escaped."""
    assume(key not in ("inputs", "id", "parameters", "outputs") and other != key)
    one, two, three = (
        json.dumps(name, ensure_ascii=data.draw(st.booleans()))
        for name in (key, data.draw(st.sampled_from([key, other])), key)
    )
    inner = data.draw(
        st.sampled_from([f"{one}: 1, {two}: 2", f'"a": {{{one}: ":", {two}: "[1]"}}, "b": [{{{three}: 1}}]'])
    )
    body = body_of("FP32", [1, 2], "[1, 2]", more=f', "other": {{{inner}}}').encode()
    model = live(("x", "FP32", 2))
    quick = outcome(model, body, QUICK)
    assert quick == outcome(model, body, ORDINARY)
    assert ("twice in one object" in str(quick)) == (json.loads(one) == json.loads(two))


def test_several_inputs_each_take_their_own_way() -> None:
    """As long as all are numbers; one of strings or booleans takes the whole request the ordinary way."""
    numbers = live(("a", "FP32", 2), ("b", "INT64", 1), ("c", "UINT64", 2))
    text = """{"id": "1", "inputs": [
        {"name": "c", "shape": [1, 2], "datatype": "UINT64", "data": [[0, 18446744073709551615]]},
        {"data": [9007199254740993], "name": "b", "shape": [1], "datatype": "INT64"},
        {"name": "a", "shape": [1, 3], "datatype": "FP32", "parameters": {"x": ":"}, "data": [1, 2.5, -0.0]}]}"""
    assert taken(numbers, text.encode())
    assert outcome(numbers, text.encode(), QUICK) == outcome(numbers, text.encode(), ORDINARY)
    words = live(("a", "FP32", 2), ("s", "BYTES", 2))
    text = """{"inputs": [{"name": "a", "shape": [1, 1], "datatype": "FP32", "data": [1]},
        {"name": "s", "shape": [1, 3], "datatype": "BYTES", "data": ["[", ":", "\\"]:"]}]}"""
    assert not taken(words, text.encode())
    assert outcome(words, text.encode(), QUICK) == outcome(words, text.encode(), ORDINARY)
    assert isinstance(outcome(words, text.encode(), QUICK)[0], list)


@pytest.mark.parametrize("datatype", NUMERIC)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_what_it_is_for_goes_that_way(datatype: str, nested: bool) -> None:
    """A test that the ordinary way passes too would not see that this one is never taken."""
    shape = [2, 3, 4]
    text = body_of(datatype, shape, written(shape, [str(i) for i in range(24)], nested=nested), more=', "id": "7"')
    assert taken(live(("x", datatype, 3)), text.encode())


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ("[1, 2, 3, [4]]", [4]),
        ("[[1, 2], [3, [4]]]", [2, 2]),
        ("[[1, 2, 3, 4]]", [2, 2]),
        ("[[1, 2, 3], [4]]", [2, 2]),
        ("[[1], [2], [3], [4]]", [2, 2]),
        ("[[[1, 2], [3, 4]]]", [2, 2]),
        ("[[1, 2], 3, 4]", [2, 2]),
        ("[1, 2, [3, 4]]", [2, 2]),
        ("[]", [0]),
        ("[[]]", [1, 0]),
        ("[[], []]", [2, 0]),
        ("[]", [2, 2]),
        ("[[], []]", [2, 2]),
        ("[1, 2, 3]", [2, 2]),
        ("[1, 2, 3, 4]", [-2, -2]),
        ("[1, 2, 3, 4]", []),
        ("{}", [1]),
        ("1", [1]),
        ("null", [1]),
        ('"[1]"', [1]),
    ],
)
@pytest.mark.parametrize("axes", [1, 2])
def test_lists_of_another_form_are_refused_in_the_same_words(data: str, shape: list[int], axes: int) -> None:
    """simdjson alone would flatten every one of them."""
    body = body_of("FP64", shape, data).encode()
    assert outcome(live(("x", "FP64", axes)), body, QUICK) == outcome(live(("x", "FP64", axes)), body, ORDINARY)


@pytest.mark.parametrize(
    "body",
    [
        "\ufeff" + body_of("FP32", [1, 2], "[1, 2]"),
        body_of("FP32", [1, 2], "[1, 2]", more=', "id": "\\u003a", "a": 1, "a": 2'),
        body_of("FP32", [1, 2], "[1, 2]", more=', "id": "\\u005b", "a": [1'),
        body_of("FP32", [1, 2], "[1, 2]", more=', "id": "\\ud800"'),
        body_of("FP32", [1, 2], "[1, 2]") + "\0",
        body_of("FP32", [1, 2], "[1, 2]") + "{}",
        body_of("FP32", [1, 2], "[1, [2]]", more=', "id": "]"'),
        body_of("FP32", [1, 2], "[1, 2]").replace('"shape"', '"Shape"'),
        body_of("FP32", [1, 2], "[1, 2]").replace('"x"', '"z"'),
        f"[{body_of('FP32', [1, 2], '[1, 2]')}]",
        '{"inputs": {"name": "x"}}',
        '{"inputs": [[1]]}',
        '{"inputs": []}',
        "{}",
        "[]",
        "",
    ],
)
def test_what_parsers_disagree_about_is_judged_alike(body: str) -> None:
    """A byte order mark, colons and brackets that are written as escapes, half a surrogate, something after the end."""
    model = live(("x", "FP32", 2))
    ordinary = outcome(model, body.encode(), ORDINARY)
    assert issubclass(ordinary[0], RequestError)  # type: ignore[arg-type]  # a class, as it was refused
    assert outcome(model, body.encode(), QUICK) == ordinary


@pytest.mark.parametrize("size", [LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1, 20 * LARGE_BYTES])
def test_the_size_changes_nothing(size: int) -> None:
    """Around the size from which on the quick way is tried, with the sizes that it is made for."""
    model = live(("x", "FP32", 2))
    count = max(size // 20, 3)
    numbers = np.random.default_rng(7).normal(0, 100, count).astype(np.float32)
    text = body_of("FP32", [1, count], json.dumps(numbers.tolist()))
    body = (text + " " * (size - len(text))).encode()
    request = v2.parse(model, body)
    assert request.accepted.tensors[0].tobytes() == numbers.tobytes()
    broken = body.replace(b"]", b", true]", 2)
    assert outcome(model, broken, LARGE_BYTES) == outcome(model, broken, ORDINARY)


@given(st.binary(max_size=300), st.sampled_from([1, 40, 300]), st.sampled_from([b"[", b":", b"\0"]))
def test_counting_is_counting(text: bytes, times: int, character: bytes) -> None:
    """Of few and of many, in short texts and in long ones."""
    whole = text * times
    assert count(whole, character) == whole.count(character)


@pytest.mark.parametrize(
    ("datatype", "data", "said"),
    [
        ("FP32", "1.5," * 300_000 + "1", None),
        ("FP32", "1," * 600_000 + "true", "value 600000 of input 'x' is the boolean true; it takes numbers (FP32)"),
        ("INT8", "1," * 600_000 + "1.5,1", "value 600000 of input 'x' is the number 1.5; it takes integers (INT8)"),
        ("INT8", "1," * 600_000 + "200", "value 600000 of input 'x' is 200, which is out of range"),
        ("FP32", "1," * 600_000 + ",1", "not valid JSON"),
        ("FP32", "1," * 600_000, "not valid JSON"),
    ],
)
def test_a_long_list_is_read_in_pieces(datatype: str, data: str, said: str | None) -> None:
    """No parser is given all of it at once, unless it is not JSON; what is wrong is found where it is."""
    model, whole = live(("x", datatype, 1)), []
    count_ = data.count(",") + 1

    def loads(body: bytes) -> Any:
        whole.append(len(body))
        return orjson.loads(body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_json, "CUT_BYTES", 2**20)
        patch.setattr(json_module, "orjson", SimpleNamespace(loads=loads, JSONDecodeError=orjson.JSONDecodeError))
        body = body_of(datatype, [count_], f"[{data}]").encode()
        if said is None:
            assert v2.parse(model, body).accepted.tensors[0].tolist() == [1.5] * 300_000 + [1.0]
        else:
            with pytest.raises(RequestError) as refused:
                v2.parse(model, body)
            assert said in str(refused.value)
    assert bool(whole) == (said == "not valid JSON")


def test_what_looks_like_the_mark_of_a_list_is_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A string is never taken for data, and a string with brackets in it stays one."""
    monkeypatch.setattr(large_json, "CUT_BYTES", 2**20)
    long = "[" + "1," * 600_000 + "1]"
    body = body_of("FP32", [1], "[1]", more=f', "id": "{long}"').encode()
    assert v2.parse(live(("x", "FP32", 1)), body).id == long
