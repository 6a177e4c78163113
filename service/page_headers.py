"""What a browser is told beside an answer, so that a page of somebody else can make nothing of it.

Source: OWASP, HTTP Security Response Headers Cheat Sheet.
"""

from __future__ import annotations

from collections.abc import Iterable

Pairs = list[tuple[bytes, bytes]]

NOSNIFF = (b"x-content-type-options", b"nosniff")
"""What is not said to be a page or a script is not taken for one."""

PAGE: Pairs = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
"""A page loads from this service alone, runs no script but its files, and is in nobody's frame."""


NO_STORE = (b"cache-control", b"no-store")
"""Of what a key opens nothing is kept: a cache does not know all the headers that a key comes in."""


def with_page_headers(said: Iterable[tuple[bytes, bytes]], *, keyed: bool) -> Pairs:
    """The headers of an answer, and these.

    Args:
        keyed: whoever asks has to bring a key.
    """
    said = list(said)
    page = any(name == b"content-type" and value.startswith(b"text/html") for name, value in said)
    return [*said, NOSNIFF, *(PAGE if page else ()), *([NO_STORE] if keyed else ())]
