"""Requests that nobody means well with: heads without end, and JSON that is all structure."""

from __future__ import annotations

import time
from contextlib import suppress

import orjson
import pytest

from service.errors import DuplicateKey, MalformedJson, RequestError
from service.protocol import predict, v2
from service.protocol.json import check_keys, parsed
from service.repository import Live, Repository
from tests.asking import loaded, save
from tests.bundles import write_table_bundle
from tests.graphs import batchnorm_model

QUICK_S = 5.0
"""A fraction of that on a machine that does nothing else."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    write_table_bundle(models)
    save(models, "norm", batchnorm_model())
    return loaded(models)


DEEP = {
    "open lists": b"[" * 100_000,
    "lists": b"[" * 100_000 + b"]" * 100_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a million digits": b"9" * 1_000_000,
    "a million negative digits": b"-" + b"9" * 1_000_000,
    "a million decimals": b"1." + b"1" * 1_000_000,
    "a million digits of exponent": b"1e" + b"9" * 1_000_000,
    "a million escapes": b'"' + b"\\u0061" * 1_000_000 + b'"',
    "a million empty objects": b"[" + b"{}," * 1_000_000 + b"{}]",
    "a million empty lists": b"[" + b"[]," * 1_000_000 + b"[]]",
    "many keys": b"{" + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}",
    "half a surrogate": b'"\\ud800"',
    "NUL": b'"\\u0000"',
}
PLACES = [
    b"%b",
    b'{"inputs":%b}',
    b'{"id":%b,"inputs":[]}',
    b'{"parameters":%b,"inputs":[]}',
    b'{"parameters":{"timeout":%b},"inputs":[]}',
    b'{"outputs":%b,"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,2,3]}]}',
    b'{"inputs":[{"name":%b,"shape":[1,3],"datatype":"FP32","data":[1,2,3]}]}',
    b'{"inputs":[{"name":"x","shape":%b,"datatype":"FP32","data":[1,2,3]}]}',
    b'{"inputs":[{"name":"x","shape":[1,%b],"datatype":"FP32","data":[1,2,3]}]}',
    b'{"inputs":[{"name":"x","shape":[1,3],"datatype":%b,"data":[1,2,3]}]}',
    b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":%b}]}',
    b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,2,%b]}]}',
]


@pytest.mark.parametrize("what", DEEP)
def test_absurd_json_is_refused_at_once(repository: Repository, what: str) -> None:
    """In every place of a request, on both wires."""
    for place in PLACES:
        for name, parse in (("norm", v2.parse), ("table", predict.parse)):
            body = place % DEEP[what]
            start = time.perf_counter()
            with suppress(RequestError):
                parse(repository.live(name), body, None)
            assert time.perf_counter() - start < QUICK_S, place


def test_a_large_request_with_an_escape_is_read_quickly(repository: Repository) -> None:
    """The keys are counted one by one, but not the numbers."""
    numbers = b",".join(b"0.123456789" for _ in range(600_000))
    body = b'{"id":"a\\\\b","inputs":[{"name":"x","shape":[200000,3],"datatype":"FP32","data":[%b]}]}' % numbers
    live: Live = repository.live("norm")
    start = time.perf_counter()
    assert v2.parse(live, body, None).accepted.rows == 200_000
    assert time.perf_counter() - start < QUICK_S


def test_a_key_twice_is_found_behind_escapes_and_numbers() -> None:
    numbers = b"[" + b"1," * 2000 + b"1]"
    check_keys(body := b'{"a\\u0062":%b,"%b":1,"%b,":2}' % (numbers, numbers, numbers), parsed(body))
    twice = b'{"ab":%b,"a\\u0062":1}' % numbers
    with pytest.raises(DuplicateKey):
        check_keys(twice, parsed(twice))


def test_brackets_have_a_number() -> None:
    with pytest.raises(MalformedJson, match="more than 131072 lists and objects"):
        parsed(b"[" + b"{}," * 140_000 + b"{}]")


def test_many_keys_that_the_model_does_not_have(repository: Repository) -> None:
    """Each would be compared with the names of all features."""
    sample = orjson.dumps({f"unknown {i}": i for i in range(100_000)})
    start = time.perf_counter()
    with pytest.raises(RequestError):
        predict.parse(repository.live("table"), sample)
    assert time.perf_counter() - start < QUICK_S
