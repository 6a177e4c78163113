"""Who may do what.

With a keys file, whoever comes has to bring an API key:

    open to all       /v2/health/live and /v2/health/ready; /, /docs and its files, which tell nothing of the models
    right 'predict'   predictions, metadata, statistics, the index, the list of aliases, /openapi.json
    right 'manage'    the rest of /v2/repository: loading, unloading, moving aliases
    right 'metrics'   /metrics

Without one, all is open but what takes 'manage': that is for the machine itself.

Rule 1: it is asked before anything else is read or told. With keys, a path that is not drawn here is nowhere.
Rule 2: a key comes in 'Authorization: Bearer KEY' or in 'X-API-Key: KEY', which counts if both come; never in a URL,
        which ends up in logs.
Rule 3: a key is hashed and compared with every key there is, so how long that takes tells nothing of any.
Rule 4: 'the machine itself' is not a page in its browser, nor a proxy on it that speaks for others.
"""

from __future__ import annotations

import re
from hashlib import sha256
from hmac import compare_digest
from typing import final
from urllib.parse import urlsplit

from service.errors import Forbidden, NotFound, Unauthorized, clipped
from service.headers import Headers
from service.keys import Key, KeysFile, Right
from service.settings import Settings, is_loopback

_OPEN = re.compile(r"/|/docs|/docs/(assets|page)/.*|/v2/health/(live|ready)", re.DOTALL)
_PREDICT = re.compile(
    r"/openapi\.json|/predict|/models/[^/]+/predict|/v2|/v2/models/.+|/v2/repository/(index|models/[^/]+/aliases)",
    re.DOTALL,
)
_MANAGE = re.compile(r"/v2/repository/.*", re.DOTALL)
_METRICS = re.compile(r"/metrics")

_WITHOUT_KEYS = "without API keys (--keys-file), models are managed only"
_PROXIED = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"})
"""What proxies add."""

_BEARER = b"bearer "


def is_open(path: str) -> bool:
    """Whether it needs no key."""
    return _OPEN.fullmatch(path) is not None


def right_of(path: str) -> Right | None:
    """What it takes to ask there; None if there is nothing, or if it is open."""
    if is_open(path):
        return None
    for right, paths in ((Right.PREDICT, _PREDICT), (Right.MANAGE, _MANAGE), (Right.METRICS, _METRICS)):
        if paths.fullmatch(path):
            return right
    return None


@final
class Access:
    """Knows the keys, and lets in."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            WrongCall: the keys file cannot be read.
        """
        self._host = settings.host
        self._file = KeysFile(settings.keys_file) if settings.keys_file is not None else None

    @property
    def needs_keys(self) -> bool:
        return self._file is not None

    def look_again(self) -> None:
        """At the keys; to be called now and then."""
        if self._file is not None:
            self._file.look_again()

    def lets_predict(self, headers: Headers) -> bool:
        """The short answer for most requests; `check` has the words."""
        if self._file is None:
            return True
        presented = _presented(headers)
        key = None if presented is None else _known(presented, self._file.keys)
        return key is not None and Right.PREDICT in key.rights

    def check(self, path: str, headers: Headers) -> str:
        """
        Args:
            path: as it will be routed.

        Returns:
            The name of the key; empty if none is needed.

        Raises:
            Unauthorized: no key came, or none that is known.
            Forbidden: the key lacks the right; or there are no keys, and this is not the machine itself.
            NotFound: there are keys, and nothing is at this path.
        """
        right = right_of(path)
        if self._file is None:
            if right is Right.MANAGE:
                _check_own_machine(self._host, headers)
            return ""
        if is_open(path):
            return ""
        presented = _presented(headers)
        key = None if presented is None else _known(presented, self._file.keys)
        if key is None:
            raise Unauthorized(presented=presented is not None)
        if right is None:
            raise NotFound(f"there is nothing at {clipped(path)}; GET /docs lists what there is")
        if right not in key.rights:
            raise Forbidden(f"the API key lacks the right '{right}'; use one that has it")
        return key.name


def _presented(headers: Headers) -> bytes | None:
    """The key that came, if one did."""
    if (key := headers.get(b"x-api-key")) is not None:
        return key
    said = headers.get(b"authorization")
    if said is None or said[: len(_BEARER)].lower() != _BEARER:
        return None
    return said[len(_BEARER) :].strip()


def _known(presented: bytes, keys: tuple[Key, ...]) -> Key | None:
    digest = sha256(presented).digest()
    known = None
    for key in keys:
        if compare_digest(digest, key.digest):
            known = key  # and on: it takes as long whichever it is
    return known


def _check_own_machine(listens_on: str, headers: Headers) -> None:
    """
    Raises:
        Forbidden: this may come from elsewhere.
    """
    if not is_loopback(listens_on):
        raise Forbidden(f"{_WITHOUT_KEYS} where the service listens on loopback alone (--host)")
    host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
    if not _PROXIED.isdisjoint(headers):
        raise Forbidden(f"{_WITHOUT_KEYS} from the machine itself, and this came through a proxy")
    if host and not _names_loopback(host):  # a name that a page's owner made point here
        raise Forbidden(f"{_WITHOUT_KEYS} under an address such as 127.0.0.1, not as '{clipped(host)}'")
    site = headers.get(b"sec-fetch-site", b"none")
    if site not in (b"none", b"same-origin") or (origin and origin.partition("://")[2] != host):
        page = f"a page of '{clipped(origin)}'" if origin else "a page of another site"
        raise Forbidden(f"{_WITHOUT_KEYS} by programs on this machine, not by {page}")


def _names_loopback(host: str) -> bool:
    """Of a Host header, with or without its port."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
