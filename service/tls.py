"""The service's certificate and its key: TLS 1.2 or newer, read again when their files change.

Rule 1: a certificate is renewed while the service runs; one that cannot be used, or is without its key for a moment,
        leaves the one that was read before, and is tried again.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import final

from service.errors import WrongCall
from service.files import Watched
from service.settings import Settings

_log = logging.getLogger(__name__)


@final
class Tls:
    """What new connections are encrypted with."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """
        Raises:
            WrongCall: they cannot be read, or are not a certificate and its key.
        """
        self._files = (certificate, key)
        self._watched = Watched(*self._files)
        self._watched.changed()
        self.context = _context(*self._files)
        self._watched.was_read()

    def look_again(self) -> None:
        """Read the files if they are other ones; to be called now and then."""
        if not self._watched.changed():
            return
        try:
            self.context = _context(*self._files)
        except WrongCall as error:
            if self._watched.failed(str(error)):
                _log.error("%s; the certificate that was read before stays in use, and they are tried again", error)
        else:
            self._watched.was_read()
            _log.info("the certificate '%s' was read again", self._files[0])


def tls_of(settings: Settings) -> Tls | None:
    """None if the service speaks plain HTTP.

    Raises:
        WrongCall: one of the two files is missing from the settings, or they cannot be used.
    """
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise WrongCall("--tls-certificate and --tls-key belong together; give both, or neither for plain HTTP")
    return Tls(certificate, key)


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    for path, flag in ((certificate, "--tls-certificate"), (key, "--tls-key")):
        try:
            path.read_bytes()
        except OSError as error:
            raise WrongCall(f"{flag} '{path}' cannot be read: {error.strerror}") from error
    encrypted = False

    def no_passphrase() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=no_passphrase)
    except (OSError, ValueError) as error:  # what openssl says is an OSError; so is that a file has just gone
        if encrypted:
            raise WrongCall(f"--tls-key '{key}' is encrypted; give one without a passphrase") from error
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise WrongCall(f"--tls-key '{key}' is not the key of the certificate in '{certificate}'") from error
        if not isinstance(error, ssl.SSLError | ValueError):
            why = getattr(error, "strerror", error)
            raise WrongCall(f"--tls-certificate '{certificate}' or --tls-key '{key}' cannot be read: {why}") from error
        raise WrongCall(
            f"--tls-certificate '{certificate}' and --tls-key '{key}' are not a certificate and its key in PEM"
        ) from error
    return context
