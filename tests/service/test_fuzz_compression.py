"""Compressed bodies, good ones and damaged ones: what comes out is what went in, within the limit, or it is refused.

What an accepted body holds is found a second time by Python's gzip module, which reads heads and checksums by itself,
and for deflate by the checksum.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest, BodyTooLarge, UnsupportedEncoding
from service.repository import Repository
from service.settings import Settings
from tests.asking import ask, decompressed, identity_model, loaded, save
from tests.fuzzing import AS_LONG_AS_IT_TAKES, TO_BYTES, Changes, changed, changes, fuzzed

pytestmark = AS_LONG_AS_IT_TAKES

LIMIT_BYTES = 2000

contents = st.binary(max_size=60) | st.tuples(st.binary(min_size=1, max_size=3), st.integers(0, 1500)).map(
    lambda it: it[0] * it[1]
)
levels = st.integers(0, 9)


def a_member(content: bytes, level: int, name: str) -> bytes:
    """With a name, a comment and more in its head, as other writers have them."""
    body = gzip.compress(content, level, mtime=0)
    flags, more = {"": (0, b""), "name": (8, b"a\0"), "comment": (16, b"b\0"), "extra": (4, b"\3\0xyz")}[name]
    return body[:3] + bytes([flags]) + body[4:10] + more + body[10:]


members = st.lists(
    st.tuples(contents, levels, st.sampled_from(["", "", "name", "comment", "extra"])), min_size=1, max_size=4
)


def raw(content: bytes, level: int) -> bytes:
    writer = zlib.compressobj(level, wbits=-15)
    return writer.compress(content) + writer.flush()


def others(content: bytes, level: int) -> list[tuple[str, bytes]]:
    """Bodies that are not what they are called."""
    return [
        ("deflate", raw(content, level)),
        ("gzip", raw(content, level)),
        ("gzip", zlib.compress(content, level)),
        ("deflate", gzip.compress(content, level)),
        ("gzip", content),
        ("deflate", content),
    ]


def check(body: bytes, encoding: str, content: bytes) -> None:
    """That an accepted body holds this and nothing else."""
    assert len(content) <= LIMIT_BYTES
    if "gzip" in encoding:
        assert gzip.decompress(body) == content
    else:
        assert zlib.adler32(content) == int.from_bytes(body[-4:], "big")
        assert zlib.decompress(body) == content


def read(body: bytes, encoding: str) -> bytes | None:
    """None if it is refused; any exception but a refusal fails the test."""
    try:
        content = decompressed(body, encoding.encode(), limit_bytes=LIMIT_BYTES)
    except (BodyTooLarge, BadRequest):
        return None
    check(body, encoding, content)
    return content


@fuzzed(120)
@given(members)
def test_members_of_gzip_belong_together(written: list[tuple[bytes, int, str]]) -> None:
    """One or several, empty ones too, up to the limit for all of them together."""
    whole = b"".join(content for content, _, _ in written)
    body = b"".join(a_member(*one) for one in written)
    if len(whole) <= LIMIT_BYTES:
        assert decompressed(body, b"gzip", limit_bytes=LIMIT_BYTES) == whole
    else:
        with pytest.raises(BodyTooLarge):
            decompressed(body, b"gzip", limit_bytes=LIMIT_BYTES)


@fuzzed(60)
@given(contents, levels, st.integers(9, 15))
def test_deflate_of_every_window_is_read(content: bytes, level: int, window: int) -> None:
    writer = zlib.compressobj(level, wbits=window)
    body = writer.compress(content) + writer.flush()
    assert read(body, "deflate") == (content if len(content) <= LIMIT_BYTES else None)


@fuzzed(200)
@given(members, st.sampled_from(["gzip", "deflate"]), st.lists(changes(TO_BYTES), min_size=6, max_size=6))
def test_a_damaged_body_is_refused_or_holds_what_another_reader_finds(
    written: list[tuple[bytes, int, str]], encoding: str, each: list[Changes]
) -> None:
    """Bits turned, cut short, members cut, doubled, joined, something between and behind them."""
    body = b"".join(a_member(*one) if encoding == "gzip" else zlib.compress(one[0], one[1]) for one in written)
    for made in each:
        read(changed(body, made), encoding)


@fuzzed(60)
@given(contents, levels)
def test_what_is_something_else_is_refused(content: bytes, level: int) -> None:
    for encoding, body in others(content, level):
        assert read(body, encoding) in (None, content)
        if body != content:
            assert read(body, encoding) is None


@fuzzed(60)
@given(st.binary(max_size=60), st.text(max_size=12).map(str.encode) | st.binary(max_size=12))
def test_any_bytes_by_any_name(body: bytes, encoding: bytes) -> None:
    """Also names that begin with one that is known."""
    try:
        content = decompressed(body, encoding, limit_bytes=LIMIT_BYTES)
    except (BodyTooLarge, BadRequest, UnsupportedEncoding):
        return
    assert content == body
    assert encoding.strip().lower() in (b"", b"identity")


# Over ASGI


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    save(models, "open", identity_model({"x": ("FP32", ["batch", "n"])}))
    return loaded(models)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "x-gzip": gzip.compress,
    "": bytes,
}


@fuzzed(40)
@given(st.integers(0, 400), st.sampled_from(list(PACK)), changes(TO_BYTES, most=1) | st.just([]), st.integers(1, 3))
def test_a_damaged_body_has_the_answer_of_what_it_holds_or_a_4xx(
    repository: Repository, count: int, encoding: str, made: Changes, parts: int
) -> None:
    said = {"inputs": [{"name": "x", "shape": [1, count], "datatype": "FP32", "data": [0.5] * count}]}
    text = json.dumps(said).encode()
    step = len(text) // parts + 1
    pieces = [text[i : i + step] for i in range(0, len(text), step)] if "gzip" in encoding else [text]
    body = changed(b"".join(PACK[encoding](piece) for piece in pieces), made)

    def answer(body: bytes, headers: dict[str, str]) -> Any:
        settings = Settings(body_limit_bytes=LIMIT_BYTES)
        return ask(repository, "POST", "/v2/models/open/infer", body, headers, settings=settings)

    response = answer(body, {"content-encoding": encoding} if encoding else {})
    content = read(body, encoding) if encoding else body
    if content is None or len(body) > LIMIT_BYTES:
        assert response.status_code in (400, 413)
        assert response.json()["code"] in ("malformed_compression", "body_too_large")
        return
    plain = answer(content, {})
    assert (response.status_code, response.content) == (plain.status_code, plain.content)
    assert response.status_code in (200, 400)
    assert made or response.status_code == 200
