"""Bodies compressed with gzip or deflate, both ways.

`deflate` is the zlib format (RFC 9110, section 8.4.1.2). A gzip body is one member or several, whose contents belong
together (RFC 1952, section 2.2). A compressed body may not grow beyond the limit for bodies.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from typing import Literal

from service.errors import BadRequest, BodyTooLarge, MalformedCompression, UnsupportedEncoding
from service.protocol import Body

Encoding = Literal["gzip", "deflate"]

WORTH_BYTES = 1024
"""A smaller answer fits a packet as it is."""

LEVEL = 1
"""Numbers hardly shrink further at a higher one, and take several times as long."""

PIECE_BYTES = 2**20
"""What is unpacked in one go: some milliseconds, and little beside a body."""

MOST_MEMBERS = 4096
"""More than a body has that was compressed in blocks of 64 KiB (bgzip); an empty one takes 20 bytes, and a new
state of the decompressor."""

_SHOWN_BYTES = 64 * 1024
"""What follows a member is copied, as far as it was shown."""

_WINDOW: dict[Encoding, int] = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_ACCEPTED = re.compile(r"\s*(?P<coding>[^\s;,]+)\s*(?:;\s*q\s*=\s*(?P<q>[0-9.]+)\s*)?")


def unpacked(body: bytes, encoding: bytes, *, limit_bytes: int) -> Iterator[bytes]:
    """What is in it, piece by piece and none of them empty, so that whoever holds them can say that it is enough.

    Args:
        encoding: the value of Content-Encoding.

    Raises:
        UnsupportedEncoding: it is neither gzip, deflate nor identity.
        MalformedCompression: the body is not that, is cut short, or goes on after its end.
        BadRequest: it has too many members.
        BodyTooLarge: uncompressed it has more bytes than the limit.
    """
    match encoding.strip().lower():
        case b"" | b"identity":
            if body:
                yield body
            return
        case b"gzip" | b"x-gzip":
            name: Encoding = "gzip"
        case b"deflate":
            name = "deflate"
        case other:
            raise UnsupportedEncoding(other.decode("latin-1"))
    at, left_bytes = 0, limit_bytes
    for _ in range(MOST_MEMBERS if name == "gzip" else 1):
        reader = zlib.decompressobj(wbits=_WINDOW[name])
        while not reader.eof:
            packed: Body = memoryview(body)[at : at + _SHOWN_BYTES]
            if not packed:
                raise MalformedCompression(encoding=name)
            at += len(packed)
            is_held_back = True
            while is_held_back:
                most_bytes = min(PIECE_BYTES, left_bytes + 1)
                try:
                    piece = reader.decompress(packed, most_bytes)
                except zlib.error as error:
                    raise MalformedCompression(encoding=name) from error
                left_bytes -= len(piece)
                if left_bytes < 0:
                    raise BodyTooLarge(limit_bytes=limit_bytes)
                if piece:
                    yield piece
                packed = reader.unconsumed_tail
                is_held_back = len(piece) == most_bytes and not reader.eof
            at -= len(reader.unused_data)
        if at == len(body):
            return
    if name == "deflate":
        raise MalformedCompression(encoding=name)
    raise BadRequest(f"the body has more than {MOST_MEMBERS} gzip members; compress it as one")


def accepted(accept_encoding: bytes) -> Encoding | None:
    """The encoding that a caller would like: the one of the greater weight, gzip if they are equal."""
    if not accept_encoding:
        return None
    weights = {"gzip": 0.0, "deflate": 0.0, "identity": 0.0}
    for part in accept_encoding.decode("latin-1").lower().split(","):
        if (found := _ACCEPTED.fullmatch(part)) and found["coding"] in weights:
            try:
                weights[found["coding"]] = float(found["q"] or 1)
            except ValueError:
                continue
    best = max(weights["gzip"], weights["deflate"])
    if not best or best < weights["identity"]:
        return None
    return "gzip" if weights["gzip"] == best else "deflate"


def compressed(content: bytes, encoding: Encoding) -> bytes:
    if encoding == "gzip":
        return gzip.compress(content, LEVEL, mtime=0)
    return zlib.compress(content, LEVEL)
