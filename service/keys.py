"""API keys: made at random, shown once, kept as hashes in a file with one line for each.

    NAME RIGHTS sha256:HEX     # RIGHTS: one or several of predict, manage and metrics, between commas

Rule 1: a key is in no file, no log and no message. Its SHA-256 is in the file; nobody finds 256 random bits by that.
Rule 2: what is wrong with a file is told by the number of a line, never by its content, which may be a key.
Rule 3: a file that is changed into one that cannot be read leaves the keys that were read before, and is tried again
        until it can: a key that was taken back must not stay because files were short for a moment.
Rule 4: a file without keys is a good one, and lets nobody in: that is how the last key is taken away.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import final

from service.errors import WrongCall, listing
from service.files import Watched

KEY_BYTES = 32
KEY_PREFIX = "em_"
"""So that people, and programs that look for secrets in sources, see what it is."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_FORM = "it takes NAME RIGHTS sha256:HEX, such as 'evalmode key' prints"

_log = logging.getLogger(__name__)


class Right(StrEnum):
    """What a key may be good for; none includes another."""

    PREDICT = "predict"
    MANAGE = "manage"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is kept of one."""

    name: str
    rights: frozenset[Right]
    digest: bytes

    @property
    def line(self) -> str:
        """As it stands in a file."""
        rights = ",".join(right for right in Right if right in self.rights)
        return f"{self.name} {rights} sha256:{self.digest.hex()}"


def made_key(name: str, rights: Iterable[str]) -> tuple[str, Key]:
    """A new key, and what is kept of it.

    Raises:
        WrongCall: the name or a right cannot be meant.
    """
    if not _NAME.fullmatch(name):
        raise WrongCall(
            f"'{name}' cannot name a key; a name is up to 64 letters, digits, dots, hyphens and underscores, and "
            "begins with a letter or a digit"
        )
    granted = frozenset(map(_right, rights))
    if not granted:
        raise WrongCall(f"a key without rights is good for nothing; rights are {listing(Right)}")
    secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return secret, Key(name=name, rights=granted, digest=hashlib.sha256(secret.encode()).digest())


def _right(name: str) -> Right:
    try:
        return Right(name)
    except ValueError:
        raise WrongCall(f"there is no right '{name}'; rights are {listing(Right)}") from None


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file.

    Raises:
        WrongCall: it cannot be read, or a line of it is not a key's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise WrongCall(f"the keys file '{path}' is not text in UTF-8; {_FORM}") from None
    except OSError as error:
        raise WrongCall(f"the keys file '{path}' cannot be read: {error.strerror}") from error
    found: dict[bytes, Key] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not (fields := line.partition("#")[0].split()):
            continue
        key = _key(fields)
        if isinstance(key, str):
            raise WrongCall(f"line {number} of the keys file '{path}' {key}")
        if key.digest in found:
            raise WrongCall(f"line {number} of the keys file '{path}' has a key that an earlier line has; give it once")
        found[key.digest] = key
    return tuple(found.values())


def _key(fields: list[str]) -> Key | str:
    """What a line says; or what is wrong with it, without its content."""
    if len(fields) != 3:
        return f"has {len(fields)} words; {_FORM}"
    name, rights, digest = fields
    if not _NAME.fullmatch(name):
        return "has a name of other characters than letters, digits, dots, hyphens and underscores"
    granted = rights.split(",")
    if not {*granted} <= {*Right}:
        return f"has a right that is unknown here; rights are {listing(Right)}, between commas"
    if not (hexadecimal := _DIGEST.fullmatch(digest)):
        return "does not end in 'sha256:' and 64 hexadecimal digits in lower case"
    return Key(name=name, rights=frozenset(map(Right, granted)), digest=bytes.fromhex(hexadecimal[1]))


@final
class KeysFile:
    """The keys of a file, as it is now."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            WrongCall: as `read_keys`.
        """
        self._path = path
        self._watched = Watched(path)
        self._watched.changed()
        self.keys = self._read()
        self._watched.was_read()

    def look_again(self) -> None:
        """Read the file if it is another one; to be called now and then."""
        if not self._watched.changed():
            return
        try:
            self.keys = self._read()
        except WrongCall as error:
            if self._watched.failed(str(error)):
                _log.error("%s; the keys that were read before stay in use, and it is tried again", error)
        else:
            self._watched.was_read()
            _log.info("the keys file '%s' was read again: %d keys", self._path, len(self.keys))

    def _read(self) -> tuple[Key, ...]:
        keys = read_keys(self._path)
        if not keys:
            _log.warning("the keys file '%s' has no keys, so nobody is let in; 'evalmode key' makes one", self._path)
        return keys
