"""One connection of clients: its socket, TLS if need be, and the channel that speaks the protocol."""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from functools import cache

import msgspec

from .protocols import HTTP2, Channel

__all__ = ["Address", "ClientConnection"]


class Address(msgspec.Struct, frozen=True):
    """Where the clients connect to. ``tls``: without verifying the certificate; ``source``: from where."""

    host: str
    port: int
    tls: bool = False
    source: str = ""


class ClientConnection:
    """One connection of one channel, again after it was cut."""

    def __init__(self, address: Address, channel: Channel, phase: float) -> None:
        self.address = address
        self.channel = channel
        self.phase = phase
        self.sock: socket.socket | None = None
        self.tls: _TLS | None = None
        self.is_connected = False
        self.unsent = b""
        self.due: float | None = None  # the time of its timer
        self.opened = 0  # when it was opened for the first time, in nanoseconds
        self.sent = self.received = 0  # bytes of TCP's payload

    def connect(self) -> socket.socket:
        """Begin to connect; the socket becomes writable when that is done."""
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.is_connected, self.unsent = False, b""
        self.opened = self.opened or time.monotonic_ns()
        self.channel.output, self.channel.due, self.channel.ended = b"", None, False
        if self.address.source:
            self.sock.bind((self.address.source, 0))
        if self.address.tls:
            self.tls = _TLS(isinstance(self.channel, HTTP2), self.address.host)
        with suppress(BlockingIOError):
            self.sock.connect((self.address.host, self.address.port))
        return self.sock

    def is_open(self, has_events: bool) -> bool:
        """Return whether it is connected, or has an event for each of its watchers."""
        if has_events:
            return all(watcher.arrivals for watcher in self.channel.watchers)
        return self.is_connected

    def flush(self) -> bool:
        """Send what there is to send; return whether all of it is sent."""
        assert self.sock is not None
        output, self.channel.output = self.channel.output, b""
        if self.tls is not None:
            output = self.tls.encrypt(output)
        self.unsent += output
        if self.unsent:
            try:
                count = self.sock.send(self.unsent)
            except BlockingIOError:
                count = 0
            self.sent += count
            self.unsent = self.unsent[count:]
        return not self.unsent

    def parse(self, data: bytes, at: int) -> None:
        """Give the channel what was read; it is not connected before a TLS handshake is complete."""
        if self.tls is not None and data:
            data = self.tls.decrypt(data)
            if self.tls.is_new:
                self.tls.is_new = False
                self.channel.begin()
            if not data:
                return
        self.channel.receive(data, at)


@cache
def _tls_context(http2: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"] if http2 else ["http/1.1"])
    return context


class _TLS:
    """TLS over a pair of buffers. ``is_new``: the handshake has just been completed."""

    def __init__(self, http2: bool, host: str) -> None:
        context = _tls_context(http2)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._is_ready = self.is_new = False
        self._shake()

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
            self._is_ready = self.is_new = True
        except ssl.SSLWantReadError:
            pass

    def encrypt(self, data: bytes) -> bytes:
        """Return what is to be sent, records of the handshake included."""
        if data:
            self._tls.write(data)
        return self._outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        """Return the bytes that are complete."""
        self._incoming.write(data)
        if not self._is_ready:
            self._shake()
        plain = b""
        try:
            while self._is_ready and (part := self._tls.read(65536)):
                plain += part
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError, ssl.SSLEOFError):
            pass
        return plain
