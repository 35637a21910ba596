"""Which authorities a client trusts with https."""

from __future__ import annotations

import os
import ssl
from functools import cache

import httpx

__all__ = ["trusted_authorities"]


def trusted_authorities(ca: str | os.PathLike[str] | None = None) -> ssl.SSLContext:
    """Return the context that verifies servers' certificates.

    Args:
        ca: path of the certificates (PEM) that are trusted. None: those of the variables
            ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``, else the system's, else those that httpx brings.

    Raises:
        ValueError: ``ca`` cannot be read, or has no certificate.
    """
    if ca is None:
        return _default_authorities()
    try:
        return _context(os.fspath(ca))
    except ssl.SSLError:
        raise ValueError(f"the file of authorities {os.fspath(ca)!r} has no certificate in PEM") from None
    except OSError as error:
        raise ValueError(f"cannot read the file of authorities {os.fspath(ca)!r}: {error.strerror}") from None


@cache  # hundreds of certificates take milliseconds
def _default_authorities() -> ssl.SSLContext:
    paths = ssl.get_default_verify_paths()  # those that exist
    has_some = bool(paths.cafile) or (bool(paths.capath) and bool(os.listdir(paths.capath)))
    return _context(None) if has_some else httpx.create_ssl_context()


def _context(ca: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["http/1.1"])
    return context
