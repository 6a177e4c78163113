"""Bodies compressed with gzip and deflate, both ways: whole, within the limit, and only where both sides know it."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest, BodyTooLarge, MalformedCompression, UnsupportedEncoding
from service.protocol.compression import (
    MOST_MEMBERS,
    PIECE_BYTES,
    WORTH_BYTES,
    Encoding,
    accepted,
    compressed,
    unpacked,
)
from service.repository import Repository
from service.settings import Settings
from tests.asking import JSON_LENGTH, ask, binary_message, decompressed, identity_model, loaded, save
from tests.bundles import SAMPLE, write_table_bundle

LIMIT = 10_000


ENCODINGS: list[Encoding] = ["gzip", "deflate"]
PACK: dict[str, Callable[..., bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
UNPACK: dict[str, Callable[..., bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(st.binary(max_size=200))
def test_what_is_compressed_by_one_is_read_by_the_other(encoding: Encoding, content: bytes) -> None:
    """By Python's own modules on the other side, at every level."""
    assert UNPACK[encoding](compressed(content, encoding)) == content
    for level in (0, 1, 9):
        assert decompressed(PACK[encoding](content, level), encoding.encode(), limit_bytes=LIMIT) == content


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_compressing_the_same_gives_the_same(encoding: Encoding) -> None:
    """No time of day is written into it."""
    assert compressed(b"abc" * 500, encoding) == compressed(b"abc" * 500, encoding)
    if encoding == "gzip":
        assert compressed(b"abc", "gzip")[4:8] == bytes(4)


@pytest.mark.parametrize("spelling", [b"", b"identity", b"Identity", b" identity "])
def test_what_is_not_compressed_is_left_as_it_is(spelling: bytes) -> None:
    assert decompressed(b"anything", spelling, limit_bytes=LIMIT) == b"anything"


@pytest.mark.parametrize("spelling", [b"gzip", b"GZip", b" gzip ", b"x-gzip"])
def test_gzip_by_any_spelling(spelling: bytes) -> None:
    assert decompressed(gzip.compress(b"abc"), spelling, limit_bytes=LIMIT) == b"abc"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1])
def test_the_limit_is_of_what_comes_out(encoding: Encoding, size: int) -> None:
    body = PACK[encoding](b"a" * size)
    assert len(body) < 100
    if size <= LIMIT:
        assert decompressed(body, encoding.encode(), limit_bytes=LIMIT) == b"a" * size
    else:
        with pytest.raises(BodyTooLarge, match=f"larger than {LIMIT} bytes"):
            decompressed(body, encoding.encode(), limit_bytes=LIMIT)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("noise", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 1], ids=str)
@pytest.mark.parametrize("zeros", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 1], ids=str)
def test_a_large_one_comes_in_pieces(encoding: Encoding, noise: int, zeros: int) -> None:
    """What hardly shrinks and what vanishes; no piece is large, and none is empty."""
    content = np.random.default_rng(1).bytes(noise) + bytes(zeros)
    pieces = [*unpacked(PACK[encoding](content, 1), encoding.encode(), limit_bytes=len(content))]
    assert b"".join(pieces) == content
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    if content:
        with pytest.raises(BodyTooLarge):
            decompressed(PACK[encoding](content, 1), encoding.encode(), limit_bytes=len(content) - 1)
    with pytest.raises(MalformedCompression):
        decompressed(PACK[encoding](content, 1) + b"x", encoding.encode(), limit_bytes=len(content))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_bomb_is_not_inflated(encoding: Encoding) -> None:
    """50 MB from 50 KB: it is stopped at the limit, and takes no memory beyond it."""
    bomb = PACK[encoding](bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            decompressed(bomb, encoding.encode(), limit_bytes=LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * LIMIT + 2 * len(bomb)  # zlib keeps a copy of what it has not read


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_body_that_is_cut_short_anywhere_is_refused(encoding: Encoding) -> None:
    """Also where all of the content is there and only its checksum is not."""
    body = PACK[encoding](b'{"a": [1, 2, 3]}')
    for end in range(len(body)):
        with pytest.raises(MalformedCompression, match=f"not whole, valid {encoding}"):
            decompressed(body[:end], encoding.encode(), limit_bytes=LIMIT)


MEMBER = gzip.compress(b"more", mtime=0)


@pytest.mark.parametrize(
    ("encoding", "rest"),
    [
        *((encoding, rest) for encoding in ENCODINGS for rest in (b"\0", bytes(512), b"x", zlib.compress(b"more"))),
        ("gzip", MEMBER + b"\0"),
        ("gzip", MEMBER[:-1]),
        ("gzip", MEMBER[:1]),
        ("deflate", MEMBER),
    ],
)
def test_nothing_may_follow(encoding: Encoding, rest: bytes) -> None:
    """No padding, and no part of something; nor a second stream of deflate, which is one only."""
    with pytest.raises(MalformedCompression):
        decompressed(PACK[encoding](b"abc") + rest, encoding.encode(), limit_bytes=LIMIT)


def test_members_of_gzip_belong_together() -> None:
    """RFC 1952, section 2.2: as bgzip and `cat a.gz b.gz` write them, empty ones too, and of any size."""
    parts = [b"abc", b"", b"x" * 3000, bytes(range(256)) * 10]
    body = b"".join(map(gzip.compress, parts))
    assert decompressed(body, b"gzip", limit_bytes=LIMIT) == b"".join(parts)
    large = np.random.default_rng(3).bytes(300_000)
    assert decompressed(gzip.compress(large) * 3, b"gzip", limit_bytes=900_000) == large * 3


@pytest.mark.parametrize("sizes", [(LIMIT, 1), (1, LIMIT), (LIMIT - 1, 0, 2), (LIMIT, 50_000_000)])
def test_the_limit_is_of_all_members_together(sizes: tuple[int, ...]) -> None:
    body = b"".join(gzip.compress(bytes(size)) for size in sizes)
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            decompressed(body, b"gzip", limit_bytes=LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * LIMIT + 3 * len(body)


def test_members_without_end_are_not_read() -> None:
    """Each costs a new decompressor and holds nothing: a million of them are refused after a few, soon."""
    empty = gzip.compress(b"")
    assert decompressed(empty * MOST_MEMBERS, b"gzip", limit_bytes=LIMIT) == b""
    body = empty * 1_000_000
    started = time.process_time()
    with pytest.raises(BadRequest, match=f"more than {MOST_MEMBERS} gzip members; compress it as one"):
        decompressed(body, b"gzip", limit_bytes=LIMIT)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_turned_bit_is_found(encoding: Encoding) -> None:
    """By the checksum, or before it."""
    body = bytearray(PACK[encoding](bytes(range(100))))
    body[-6] ^= 1
    with pytest.raises(MalformedCompression):
        decompressed(bytes(body), encoding.encode(), limit_bytes=LIMIT)


def _raw_deflate(content: bytes) -> bytes:
    """What some call deflate, without the zlib header that RFC 9110 asks for."""
    writer = zlib.compressobj(wbits=-15)
    return writer.compress(content) + writer.flush()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"a": 1}', "gzip"),
        (b'{"a": 1}', "deflate"),
        (gzip.compress(b"abc", mtime=0), "deflate"),
        (zlib.compress(b"abc"), "gzip"),
        (_raw_deflate(b"abc"), "deflate"),
        (b"", "gzip"),
        (b"", "deflate"),
    ],
)
def test_a_body_that_is_something_else_is_refused(body: bytes, said: Encoding) -> None:
    with pytest.raises(MalformedCompression, match=f"the body is not whole, valid {said}"):
        decompressed(body, said.encode(), limit_bytes=LIMIT)


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, deflate", "gzip,gzip", "*", "gzip;q=1", "ä"])
def test_other_codings_are_not_understood(encoding: str) -> None:
    with pytest.raises(UnsupportedEncoding, match="this route takes gzip, deflate or none"):
        decompressed(b"abc", encoding.encode(), limit_bytes=LIMIT)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("GZIP", "gzip"),
        ("gzip, deflate", "gzip"),
        ("deflate, gzip", "gzip"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip ; q = 0.5 , deflate;Q=0.8", "deflate"),
        ("gzip;q=0.8, deflate;q=0.5", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=0.000, deflate;q=0.000", None),
        ("deflate;q=0.001", "deflate"),
        ("br", None),
        ("identity", None),
        ("br;q=1.0, gzip;q=0.2", "gzip"),
        ("gzip;q=x", None),
        ("gzip;q=1.2.3", None),
        ("gzip;q=., deflate;q=0.1", "deflate"),
        ("gzip;level=9", None),
        ("notgzip, gzipped", None),
        (",,", None),
        (";q=1", None),
        ("ä", None),
    ],
)
def test_the_caller_chooses_by_weight(header: str, wanted: str | None) -> None:
    """RFC 9110, section 12.5.3; what cannot be read is not asked for."""
    assert accepted(header.encode("latin-1")) == wanted


@given(st.binary(max_size=30))
def test_any_header_is_read(header: bytes) -> None:
    assert accepted(header) in (None, "gzip", "deflate")


# Over HTTP


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    save(models, "open", identity_model({"x": ("FP32", ["batch", "n"])}))
    return loaded(models)


def request(count: int) -> tuple[dict[str, Any], list[float]]:
    numbers = [i * 0.5 for i in range(count)]
    return {"inputs": [{"name": "x", "shape": [1, count], "datatype": "FP32", "data": numbers}]}, numbers


def ask_open(repository: Repository, body: Any, limit_bytes: int = 2**20, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    path, limit = "/v2/models/open/infer", Settings(body_limit_bytes=limit_bytes)
    return ask(repository, "POST", path, body, {"accept-encoding": "", **named}, settings=limit)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [3, 100_000], ids=["small", "in a thread"])
def test_a_compressed_request_is_answered_like_a_plain_one(
    repository: Repository, encoding: Encoding, count: int
) -> None:
    said, _ = request(count)
    plain = ask_open(repository, said)
    packed = ask_open(repository, PACK[encoding](json.dumps(said).encode()), content_encoding=encoding)
    assert (plain.status_code, plain.content) == (packed.status_code, packed.content)
    assert plain.status_code == 200


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_length_of_the_json_is_that_of_the_uncompressed(repository: Repository, encoding: Encoding) -> None:
    blob = np.arange(4, dtype="<f4").tobytes()
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    body, headers = binary_message({"inputs": [tensor]}, blob)
    packed = PACK[encoding](body)
    response = ask(repository, "POST", "/v2/models/open/infer", packed, {**headers, "content-encoding": encoding})
    assert response.json()["outputs"][0]["data"] == [0.0, 1.0, 2.0, 3.0]
    raw = {JSON_LENGTH: "0", "content-encoding": encoding}
    assert ask(repository, "POST", "/v2/models/open/infer", PACK[encoding](blob), raw).content.endswith(blob)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [2_000, 60_000], ids=["on the loop", "in a thread"])
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_an_answer_is_compressed_if_it_is_asked_for(
    repository: Repository, encoding: Encoding, count: int, binary: bool
) -> None:
    """The header with the length of the JSON is that of the uncompressed, as Triton has it."""
    said, numbers = request(count)
    said["parameters"] = {"binary_data_output": binary}
    plain = ask_open(repository, said)
    packed = ask_open(repository, said, accept_encoding=encoding)
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == encoding
    assert "accept-encoding" in packed.headers["vary"].lower()
    assert packed.content == plain.content  # httpx has read it by its header
    assert int(packed.headers["content-length"]) < len(plain.content)
    assert packed.headers["content-type"] == plain.headers["content-type"]
    assert packed.headers.get(JSON_LENGTH) == plain.headers.get(JSON_LENGTH)
    if binary:
        assert np.frombuffer(plain.content[int(plain.headers[JSON_LENGTH]) :], dtype="<f4").tolist() == numbers


@pytest.mark.parametrize("accept", ["", "identity", "br", "gzip;q=0", "zstd, br;q=0.5"])
def test_an_answer_is_not_compressed_otherwise(repository: Repository, accept: str) -> None:
    response = ask_open(repository, request(2_000)[0], accept_encoding=accept)
    assert response.status_code == 200
    assert "content-encoding" not in response.headers


def test_small_answers_are_not_compressed(repository: Repository) -> None:
    """On both sides of the size from which on it pays."""
    sizes: dict[bool, list[int]] = {False: [], True: []}
    for count in range(100, 300, 5):
        response = ask_open(repository, request(count)[0], accept_encoding="gzip")
        sizes["content-encoding" in response.headers].append(len(response.content))
    assert max(sizes[False]) < WORTH_BYTES <= min(sizes[True])


def test_refusals_are_not_compressed(repository: Repository) -> None:
    response = ask_open(repository, {"inputs": [{"name": "x" * 2000}]}, accept_encoding="gzip")
    assert response.status_code == 400
    assert "content-encoding" not in response.headers


@pytest.mark.parametrize("encoding", ["br", "gzip, deflate", "zstd"])
def test_an_unknown_coding_is_a_415_that_says_which_are_known(repository: Repository, encoding: str) -> None:
    response = ask_open(repository, request(3)[0], content_encoding=encoding)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_encoding")
    assert response.headers["accept-encoding"] == "gzip, deflate"
    assert f"the content encoding is '{encoding}'" in response.json()["error"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_malformed_and_too_large_are_refused_as_such(repository: Repository, encoding: Encoding) -> None:
    whole = PACK[encoding](json.dumps(request(3)[0]).encode())
    for body, status, code in [
        (whole[:-1], 400, "malformed_compression"),
        (whole + b"x", 400, "malformed_compression"),
        (json.dumps(request(3)[0]).encode(), 400, "malformed_compression"),
        (PACK[encoding](b" " * 20_001), 413, "body_too_large"),
        (PACK[encoding](bytes(5_000_000)), 413, "body_too_large"),
        (PACK[encoding](b""), 400, "malformed_json"),
    ]:
        response = ask_open(repository, body, limit_bytes=20_000, content_encoding=encoding)
        assert (response.status_code, response.json()["code"]) == (status, code)
    assert ask_open(repository, whole, limit_bytes=20_000, content_encoding=encoding).status_code == 200


def test_identity_is_no_coding(repository: Repository) -> None:
    assert ask_open(repository, request(3)[0], content_encoding="identity").status_code == 200


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_sample_of_named_features_may_be_compressed_too(tmp_path: Any, encoding: Encoding) -> None:
    write_table_bundle(tmp_path, name="credit")
    credit = loaded(tmp_path)
    plain = ask(credit, "POST", "/predict", SAMPLE)
    packed = ask(
        credit, "POST", "/predict", PACK[encoding](json.dumps(SAMPLE).encode()), {"content-encoding": encoding}
    )
    assert (packed.status_code, packed.content) == (200, plain.content)
