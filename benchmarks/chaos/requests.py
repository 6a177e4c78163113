"""The requests, good and bad, each with what may be answered to it.

Rule 1: a request depends on its `Random` and the models alone.
Rule 2: a good one knows its answer: the body that the model gives in process.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import orjson

from service.protocol import Parse, predict, v2
from service.protocol.compression import Encoding, compressed
from service.repository import Live

NAMED, DENSE = "credit", "dense"
"""The models: one of named features, one of a tensor `x: float32[batch, 30]`."""
FEATURES = 30

NAMED_PATH = f"/models/{NAMED}/predict"
INFER_PATH = f"/v2/models/{DENSE}/infer"
JSON_LENGTH = "Inference-Header-Content-Length"

BODY_LIMIT_BYTES = 2**20
"""Of the server, so that a bomb need not be large."""

OK = frozenset({200})
BAD = frozenset({400})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What is sent over one connection, and what may come back."""

    parts: Sequence[bytes]
    """Sent one after the other, with pauses between them."""
    allowed: frozenset[int]
    """Statuses of every answer that carries no expectation of its own."""
    expected: Sequence[bytes | None] = (None,)
    """A body for each answer that must come; None: any body."""
    may_close: bool = False
    """The server may close the connection instead, or after it."""
    may_be_silent: bool = False
    """It may have become one that is not whole, which is not answered."""
    leaves: bool = False
    """The client does not wait for an answer, and closes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What is served, in this process too."""

    named: Live
    dense: Live


Make = Callable[[Random, Models], Attempt]
KINDS: dict[str, tuple[int, Make]] = {}
"""By name: how often beside the others, and how it is made."""


def attempt(seed: int, number: int, models: Models) -> tuple[str, Attempt]:
    """Request `number` of a seed, with its kind."""
    random = Random(f"{seed}/{number}")
    (kind,) = random.choices([*KINDS], [weight for weight, _ in KINDS.values()])
    return kind, KINDS[kind][1](random, models)


def _kind(name: str, often: int = 4) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        KINDS[name] = (often, make)
        return make

    return keep


def http(path: str, body: bytes, headers: Mapping[str, str] | None = None, *, method: str = "POST") -> bytes:
    said = {"Host": "chaos", "Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in said.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def sample(random: Random, models: Models) -> dict[str, Any]:
    """Named features, as the model's example has them, with other numbers and categories."""
    said: dict[str, Any] = dict(models.named.admitted.signature.example())
    for words in models.named.admitted.signature.categorical:
        said[words.name] = random.choice([*words.categories, "never seen"])
    for number in models.named.admitted.signature.continuous:
        said[number.name] = random.choice([random.randint(0, 90), random.uniform(0, 5000)])
    return said


def rows(random: Random, most: int = 4) -> np.ndarray:
    """x: float32[1 to most, 30]"""
    count = random.randint(1, most)
    numbers = np.random.default_rng(random.getrandbits(32)).normal(3, 20, (count, FEATURES))
    return np.round(numbers, 3).astype(np.float32)


def tensor(x: np.ndarray, **more: object) -> dict[str, Any]:
    return {"name": "x", "shape": list(x.shape), "datatype": "FP32", **more}


def infer(x: np.ndarray) -> dict[str, Any]:
    return {"inputs": [tensor(x, data=x.ravel().tolist())]}


def binary(x: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a request whose answer is binary too."""
    asked = {
        "inputs": [tensor(x, parameters={"binary_data_size": x.nbytes})],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(asked).encode()
    return head + x.tobytes(), {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(head))}


def answer(live: Live, parse: Parse, body: bytes, json_bytes: int | None = None) -> bytes:
    """The body of the answer, without a server."""
    request = parse(live, body, json_bytes)
    return request.render(live.admitted.runtime.run(request.accepted.tensors))[0]


# Good ones


@_kind("named features", 12)
def _(random: Random, models: Models) -> Attempt:
    body = orjson.dumps(sample(random, models))
    return good(http(NAMED_PATH, body), answer(models.named, predict.parse, body))


@_kind("tensors in JSON", 12)
def _(random: Random, models: Models) -> Attempt:
    body = orjson.dumps(infer(rows(random)))
    return good(http(INFER_PATH, body), answer(models.dense, v2.parse, body))


@_kind("tensors in JSON, nested, with an id")
def _(random: Random, models: Models) -> Attempt:
    x = rows(random)
    body = json.dumps({"id": "a\\b", "inputs": [tensor(x, data=x.tolist())]}).encode()
    return good(http(INFER_PATH, body), answer(models.dense, v2.parse, body))


@_kind("one row without a batch axis")
def _(random: Random, models: Models) -> Attempt:
    body = orjson.dumps(infer(rows(random, 1)[0]), option=orjson.OPT_SERIALIZE_NUMPY)
    return good(http(INFER_PATH, body), answer(models.dense, v2.parse, body))


@_kind("large tensors in JSON", 2)
def _(random: Random, models: Models) -> Attempt:
    body = orjson.dumps(infer(np.repeat(rows(random), 60, axis=0)))
    return good(http(INFER_PATH, body), answer(models.dense, v2.parse, body))


@_kind("binary tensors", 8)
def _(random: Random, models: Models) -> Attempt:
    body, headers = binary(rows(random))
    return good(http(INFER_PATH, body, headers), answer(models.dense, v2.parse, body, int(headers[JSON_LENGTH])))


@_kind("large binary tensors", 2)
def _(random: Random, models: Models) -> Attempt:
    body, headers = binary(np.repeat(rows(random, 2), 600, axis=0))
    return good(http(INFER_PATH, body, headers), answer(models.dense, v2.parse, body, int(headers[JSON_LENGTH])))


@_kind("raw binary")
def _(random: Random, models: Models) -> Attempt:
    body = rows(random, 1).tobytes()
    headers = {"Content-Type": "application/octet-stream", JSON_LENGTH: "0"}
    return good(http(INFER_PATH, body, headers), answer(models.dense, v2.parse, body, 0))


@_kind("compressed, both ways")
def _(random: Random, models: Models) -> Attempt:
    body = orjson.dumps(infer(rows(random, 40)))
    encoding: Encoding = random.choice(["gzip", "deflate"])
    headers = {"Content-Encoding": encoding, "Accept-Encoding": random.choice(["gzip", "deflate", "identity"])}
    return good(http(INFER_PATH, compressed(body, encoding), headers), answer(models.dense, v2.parse, body))


@_kind("chunked")
def _(random: Random, models: Models) -> Attempt:
    body = orjson.dumps(infer(rows(random)))
    cut = random.randrange(1, len(body))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:cut], body[cut:], b""))
    head = http(INFER_PATH, b"", {"Content-Length": "", "Transfer-Encoding": "chunked"})
    return good(head + chunks, answer(models.dense, v2.parse, body))


@_kind("several at once")
def _(random: Random, models: Models) -> Attempt:
    bodies = [orjson.dumps(infer(rows(random))) for _ in range(random.randint(2, 5))]
    answers = [answer(models.dense, v2.parse, body) for body in bodies]
    return Attempt(parts=[b"".join(http(INFER_PATH, body) for body in bodies)], allowed=OK, expected=answers)


@_kind("in slow drops")
def _(random: Random, models: Models) -> Attempt:
    body, headers = binary(np.repeat(rows(random, 2), random.choice([1, 400]), axis=0))
    expected = answer(models.dense, v2.parse, body, int(headers[JSON_LENGTH]))
    return Attempt(parts=_cut(random, http(INFER_PATH, body, headers), 5), allowed=OK, expected=[expected])


@_kind("about the models")
def _(random: Random, models: Models) -> Attempt:
    path = random.choice(["/v2", "/v2/health/ready", f"/v2/models/{DENSE}", f"/v2/models/{NAMED}/config"])
    return Attempt(parts=[http(path, b"", method="GET")], allowed=OK)


# Well-formed HTTP whose body is none


@_kind("JSON cut short")
def _(random: Random, models: Models) -> Attempt:
    path, body = _some_json(random, models)
    return bad(http(path, body[: random.randrange(len(body))]))


@_kind("JSON with bytes changed")
def _(random: Random, models: Models) -> Attempt:
    path, body = _some_json(random, models)
    return Attempt(parts=[http(path, changed(random, body))], allowed=OK | BAD)


@_kind("another shape")
def _(random: Random, models: Models) -> Attempt:
    asked = infer(rows(random))
    asked["inputs"][0]["shape"] = random.choice([[], [0, 30], [1, 31], [-1, 30], [2**62, 2**62], [1] * 40, "30", None])
    return bad(http(INFER_PATH, orjson.dumps(asked)))


@_kind("absurd numbers")
def _(random: Random, models: Models) -> Attempt:
    number = random.choice(
        ["1e400", "9" * 100_000, "-1e39", "NaN", "Infinity", "1" + "0" * 5000, "0." + "1" * 10**5 + "e999"]
    )
    body = json.dumps(infer(np.zeros((1, FEATURES)))).replace("0.0", number, 1).encode()
    return bad(http(INFER_PATH, body))


@_kind("deep nesting")
def _(random: Random, models: Models) -> Attempt:
    opening, closing = random.choice([("[", "]"), ('{"a":', "1}"), ("[", "")])
    deep = opening * 100_000 + closing * 100_000
    where = random.choice(["%s", '{"inputs": %s}', '{"id": %s, "inputs": []}', '{"parameters": {"a": %s}}'])
    return bad(http(random.choice([INFER_PATH, NAMED_PATH]), (where % deep).encode()))


@_kind("a key twice")
def _(random: Random, models: Models) -> Attempt:
    path, body = _some_json(random, models)
    key = orjson.dumps(next(iter(orjson.loads(body))))
    return bad(http(path, body[:-1] + b"," + key + b":1}"))


@_kind("wrong binary lengths")
def _(random: Random, models: Models) -> Attempt:
    body, headers = binary(rows(random))
    match random.randrange(3):
        case 0:
            body = body[: -random.randint(1, 100)]
        case 1:
            body += bytes(random.randint(1, 100))
        case _:
            headers[JSON_LENGTH] = random.choice(["-1", "x", "1", str(len(body) + 1), "9" * 30])
    return bad(http(INFER_PATH, body, headers))


@_kind("a bomb")
def _(random: Random, models: Models) -> Attempt:
    asked = http(INFER_PATH, _bomb(random.choice([2, 8, 64])), {"Content-Encoding": "gzip"})
    return Attempt(parts=[asked], allowed=frozenset({413}))


@_kind("badly compressed")
def _(random: Random, models: Models) -> Attempt:
    body = gzip.compress(orjson.dumps(infer(rows(random))))
    body = random.choice([body[:-9], body + b"more", b"no gzip"])
    return bad(http(INFER_PATH, body, {"Content-Encoding": "gzip"}))


@_kind("for nobody here")
def _(random: Random, models: Models) -> Attempt:
    _, body = _some_json(random, models)
    asked, status = random.choice(
        [
            (http("/v2/models/nobody/infer", body), 404),
            (http(f"/v2/models/{DENSE}/versions/9/infer", body), 404),
            (http("/nowhere/%2e%2e/%00", body), 404),
            (http(INFER_PATH, body, method="PUT"), 405),
            (http(INFER_PATH, body, {"Content-Type": "text/html"}), 415),
            (http(INFER_PATH, body, {"Content-Encoding": "br"}), 415),
        ]
    )
    return Attempt(parts=[asked], allowed=frozenset({status}))


@_kind("more than is read")
def _(random: Random, models: Models) -> Attempt:
    body = b" " * (BODY_LIMIT_BYTES + random.randint(1, 1000))
    return Attempt(parts=[http(INFER_PATH, body)], allowed=frozenset({413}), may_close=True)


# What is not HTTP, or does not stay


@_kind("not HTTP")
def _(random: Random, models: Models) -> Attempt:
    noise = random.choice([random.randbytes(random.randint(8, 3000)), b"\x16\x03\x01" + random.randbytes(200)])
    return Attempt(parts=[noise + b"\r\n\r\n"], allowed=BAD | {431}, may_close=True)


@_kind("a head with bytes changed")
def _(random: Random, models: Models) -> Attempt:
    path, body = _some_json(random, models)
    asked = http(path, body)
    head = asked[: asked.index(b"\r\n\r\n")]
    parts = [changed(random, head) + asked[len(head) :]]
    return Attempt(parts=parts, allowed=frozenset(range(200, 500)), may_close=True, may_be_silent=True)


@_kind("a head without end", 2)
def _(random: Random, models: Models) -> Attempt:
    path, body = _some_json(random, models)
    many = {f"x-{i}": "a" * random.choice([0, 1000]) for i in range(2000)}
    asked = random.choice(
        [http(path, body, {"x-large": "a" * 100_000}), http(path, body, many), http("/" + "a" * 100_000, body)]
    )
    return Attempt(parts=[asked], allowed=frozenset({431}), may_close=True)


@_kind("good, then garbage")
def _(random: Random, models: Models) -> Attempt:
    body = orjson.dumps(infer(rows(random)))
    expected = answer(models.dense, v2.parse, body)
    garbage = b"\x00\x01 garbage\r\n\r\n"
    return Attempt(parts=[http(INFER_PATH, body) + garbage], allowed=BAD, expected=[expected, None], may_close=True)


@_kind("gone half-way")
def _(random: Random, models: Models) -> Attempt:
    body, headers = binary(np.repeat(rows(random, 2), random.choice([1, 600]), axis=0))
    asked = http(INFER_PATH, body, headers)
    parts = _cut(random, asked[: random.randrange(1, len(asked))], 2)
    return Attempt(parts=parts, allowed=frozenset(), expected=(), leaves=True)


@_kind("gone before its answer")
def _(random: Random, models: Models) -> Attempt:
    path, body = _some_json(random, models)
    return Attempt(parts=[http(path, body) * random.randint(1, 3)], allowed=OK, expected=(), leaves=True)


def good(asked: bytes, expected: bytes) -> Attempt:
    return Attempt(parts=[asked], allowed=OK, expected=[expected])


def bad(asked: bytes) -> Attempt:
    return Attempt(parts=[asked], allowed=BAD)


def changed(random: Random, content: bytes) -> bytes:
    """With some bytes flipped, left out or put in."""
    found = bytearray(content)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(found))
        match random.randrange(3):
            case 0:
                found[place] = random.randrange(256)
            case 1:
                del found[place]
            case _:
                found.insert(place, random.randrange(256))
    return bytes(found)


@functools.cache
def _bomb(times: int) -> bytes:
    return gzip.compress(bytes(times * BODY_LIMIT_BYTES), 9)


def _some_json(random: Random, models: Models) -> tuple[str, bytes]:
    if random.random() < 0.5:
        return NAMED_PATH, orjson.dumps(sample(random, models))
    return INFER_PATH, orjson.dumps(infer(rows(random)))


def _cut(random: Random, content: bytes, most: int) -> list[bytes]:
    places = sorted({0, len(content), *(random.randrange(len(content)) for _ in range(most - 1))})
    return [content[start:end] for start, end in itertools.pairwise(places)]
