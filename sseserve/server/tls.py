"""The certificate of a server that speaks TLS itself, and the handshake that a connection begins with.

1. A certificate is used with its key, or not at all: where one of the files was replaced before the other,
   the pair that was loaded before stays in use until both fit.
2. New connections get the new certificate; those that are open go on.
3. A client has as long for its handshake as for the head of a request.
"""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import NoReturn

import trio

from ..errors import BadRequest, ConfigError
from ..live.tls import TlsBuffers, TlsTransport
from ..live.transport import Transport
from .drain import IdleConnections

__all__ = ["Certificates", "accept_tls", "open_certificates"]

log = logging.getLogger(__name__)

CHECK = 5.0  # seconds between two looks at the files
READ = 64 * 1024
HANDSHAKE = 0x16  # the type of the first record (RFC 8446, section 5.1)

# Those of TLS 1.2 that keep past connections secret and that HTTP/2 allows (RFC 9113, section 9.2.2); all of
# TLS 1.3 do.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def open_certificates(cert: str | None, key: str | None) -> Certificates | None:
    """Load what the settings ``tls_cert`` and ``tls_key`` name; None: this server does not speak TLS.

    Raises:
        ConfigError: only one of them is set, or they cannot be used.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        given, missing = ("tls_cert", "tls_key") if key is None else ("tls_key", "tls_cert")
        raise ConfigError(f"{given} needs {missing}: a server that speaks TLS has a certificate and its key")
    return Certificates(cert, key)


class Certificates:
    """A certificate with its chain, and its key, from files of PEM.

    Args:
        cert: path of the certificate, and of those that it is signed by, in this order.
        key: path of its key.

    Raises:
        ConfigError: they cannot be used.
    """

    def __init__(self, cert: str, key: str) -> None:
        self._paths = cert, key
        self._buffers = TlsBuffers.create()
        self._complaint = ""  # of the last check
        self._found = self._look()
        self._context = _load(cert, key)

    def wrap(self, transport: Transport) -> TlsTransport:
        """Return what speaks TLS over the socket of a connection."""
        return TlsTransport(transport, self._context, self._buffers)

    def reload(self) -> bool:
        """Load the files again, for new connections; returns whether they are others than before.

        Raises:
            ConfigError: they cannot be used; what was loaded before stays in use.
        """
        before = self._found
        found = self._look()  # first: what is replaced meanwhile is loaded at the next check
        self._context = _load(*self._paths)
        self._found, self._complaint = found, ""
        return found != before

    async def run(self) -> None:
        """Load the files when they have changed, for ever."""
        while True:
            await trio.sleep(CHECK)
            self.check()

    def check(self) -> None:
        """Load the files if they have changed; what is wrong with them is logged once."""
        if self._look() == self._found:
            return
        try:
            self.reload()
        except ConfigError as error:
            if self._complaint != str(error):
                self._complaint = str(error)
                log.error("%s; the certificate that was loaded before stays in use", error)
        else:
            log.info("loaded the new certificate in %s", self._paths[0])

    def _look(self) -> list[tuple[int, ...] | None]:
        """Return what changes when a file is written or replaced; None for one that is not there."""
        return list(map(_identity, self._paths))


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _load(cert: str, key: str) -> ssl.SSLContext:
    for setting, path, label in (
        ("tls_cert", cert, b"-----BEGIN CERTIFICATE-----"),
        ("tls_key", key, b"PRIVATE KEY-----"),
    ):
        try:
            has_label = label in Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {setting} = {path!r}: {error.strerror}") from error
        if not has_label:
            what = "certificate" if setting == "tls_cert" else "private key"
            raise ConfigError(f"{setting} = {path!r} has no {what} in PEM (a line {label.decode()!r})")

    def refuse_password() -> NoReturn:  # OpenSSL would ask for it on the terminal
        raise ConfigError(
            f"tls_key = {key!r} is encrypted; write it without a password to a file that only the server may "
            f"read: openssl pkey -in {key} -out NEW"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client would cost a handshake as often as it likes
    try:
        context.load_cert_chain(cert, key, refuse_password)
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"tls_key = {key!r} is not the key of the first certificate in tls_cert = {cert!r}"
            ) from error
        raise ConfigError(f"tls_cert = {cert!r} and tls_key = {key!r} cannot be used: {error}") from error
    return context


async def accept_tls(
    transport: Transport, certificates: Certificates, idle: IdleConnections, *, timeout: float, is_late: bool
) -> TlsTransport | None:
    """Let a client begin with its handshake.

    Args:
        transport: the connection.
        certificates: what the server has.
        idle: closes it when the server stops.
        timeout: how long the handshake may take, in seconds.
        is_late: the server was stopping already when it accepted the connection.

    Returns:
        What replaces the transport; None: the connection is to be closed.

    Raises:
        BadRequest: the client speaks HTTP without TLS.
        trio.BrokenResourceError: it has left, or does not speak TLS as it should.
    """
    with trio.move_on_after(timeout) as scope:
        if (first := transport.try_receive(READ)) is None:
            with idle.add(scope, transport, has_begun=is_late):
                first = await transport.receive_later(READ)
        if not first:
            return None
        if first[:1].isalpha():
            raise BadRequest("this port speaks https: use a URL that begins with https://")
        secured = certificates.wrap(transport)
        with idle.add(scope, secured, has_begun=True):
            try:
                await secured.do_handshake(first)
            except trio.BrokenResourceError as error:
                log.debug("the handshake of %s has failed: %s", transport.peer, error)
                raise
        return secured
    return None
