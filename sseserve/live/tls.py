"""One TLS stream over a socket that can also be written without waiting.

OpenSSL encrypts and decrypts in memory only, and the socket is read and written here, so that ``try_send``
encrypts and writes at once.

Guarantee: that of ``Transport``. What is encrypted is sent whole, and in the order in which it was encrypted:
also what OpenSSL itself answers to its peer, such as a key update (RFC 8446, section 4.6.3).

All connections of a server share the two buffers that OpenSSL reads from and writes to, as each call empties
both before another task runs: a buffer of its own would keep the size of the largest write of its connection.
"""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from typing import NamedTuple

import trio

from .transport import Transport

__all__ = ["TlsBuffers", "TlsTransport"]

READ = 64 * 1024
RECORD = 16 * 1024  # bytes that one record holds at most (RFC 8446, section 5.1)
PIECE = 64 * 1024  # bytes that are encrypted at once: the others wait as they are, shared by all clients
MAX_ANSWERS = 64 * 1024  # bytes of OpenSSL's own answers that may wait for a peer that does not read


class TlsBuffers(NamedTuple):
    """What OpenSSL reads from and writes to, for all connections that are served in one thread."""

    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO

    @classmethod
    def create(cls) -> TlsBuffers:
        """Return empty ones."""
        return cls(ssl.MemoryBIO(), ssl.MemoryBIO())


class TlsTransport(Transport):
    """The server's side of a TLS connection, over the socket of another transport, which it replaces.

    Args:
        transport: has the socket, and what was received from it already.
        context: has the certificate.
        buffers: shared by all transports of this thread.
    """

    __slots__ = ("_has_ended", "_incoming", "_is_closing", "_outgoing", "_rest", "_tls")

    def __init__(self, transport: Transport, context: ssl.SSLContext, buffers: TlsBuffers) -> None:
        super().__init__(transport.socket, transport.peer)
        self.client = transport.client
        self._incoming, self._outgoing = buffers
        self._tls = context.wrap_bio(*buffers, server_side=True)
        self._rest = memoryview(b"")  # what follows the tail, and is not encrypted yet
        self._has_ended = False  # the peer has closed its side
        self._is_closing = False  # it has been told that nothing follows

    @property
    def alpn(self) -> str | None:
        """The protocol that was chosen by ALPN (RFC 7301); None: the client offers none that is known."""
        return self._tls.selected_alpn_protocol()

    async def do_handshake(self, received: bytes) -> None:
        """Agree on keys with the peer; ``received`` has come from it already.

        Raises:
            trio.BrokenResourceError: the peer has disconnected, or does not speak TLS as it should.
        """
        while True:
            self._incoming.write(received)
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                is_done = False
            except ssl.SSLError as error:
                raise self._failed(error) from error
            else:
                is_done = True
                self._pushed = self._decrypt()  # a request may have come with the end of the handshake
            self._send_answers()
            if self.tail is not None:
                await self.flush()
            if is_done:
                return
            await trio.lowlevel.wait_readable(self.socket)
            received = self._read_socket(READ) or b""
            if not received:
                raise trio.BrokenResourceError("the peer has left in the middle of the handshake")

    # Receiving

    def _read_socket(self, max_bytes: int) -> bytes | None:
        assert self._fileno is not None
        try:
            return os.read(self._fileno(), max_bytes)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._broken(error) from error

    def _decrypt(self) -> bytes:
        """Decrypt what is in the buffer, all of it; note the end."""
        parts = []
        # No record is complete any more when both are empty; asking for one would raise an exception.
        while self._incoming.pending or self._tls.pending():
            try:
                part = self._tls.read(RECORD)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                part = b""
            except ssl.SSLError as error:
                raise self._failed(error) from error
            if not part:
                self._has_ended = True
                self._incoming.read()  # nothing counts that comes after it
                break
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def try_receive(self, max_bytes: int) -> bytes | None:
        if self._pushed:
            return super().try_receive(max_bytes)
        if self._has_ended:
            return b""
        if (data := self._read_socket(max_bytes)) is None:
            return None
        if not data:
            # Without a close_notify, as many clients end: the framing of HTTP says what is complete.
            self._has_ended = True
            return b""
        self._incoming.write(data)
        received = self._decrypt()
        self._send_answers()
        if not received:
            return b"" if self._has_ended else None
        self._pushed = received[max_bytes:]  # it may end a record that had begun before
        return received[:max_bytes]

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while (data := self.try_receive(max_bytes or READ)) is None:
            await trio.lowlevel.wait_readable(self.socket)
        return data

    async def receive_later(self, max_bytes: int) -> bytes:
        if self._pushed or self._has_ended:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.wait_readable(self.socket)
        while (data := self.try_receive(max_bytes)) is None:
            await trio.lowlevel.wait_readable(self.socket)
        return data

    def is_readable(self) -> bool:
        return self._has_ended or super().is_readable()

    async def wait_disconnected(self) -> bool:
        assert self._fileno is not None
        self._pushed = b""
        while self._waits:
            if self._has_ended:
                return True
            try:
                await trio.lowlevel.wait_readable(self.socket)
            except trio.ClosedResourceError:
                if self._fileno() == -1:
                    raise
                continue
            self.try_receive(4096)
            self._pushed = b""
        return False

    # Sending

    def _failed(self, error: ssl.SSLError) -> trio.BrokenResourceError | trio.ClosedResourceError:
        """Tell the peer what it has done wrong, if that can be sent at once; return what to raise."""
        assert self._fileno is not None
        if self._fileno() == -1:
            return trio.ClosedResourceError("this transport is closed")
        self._incoming.read()
        self._is_closing = True  # nothing can follow
        alert = self._outgoing.read()
        if alert and not self._busy and self.tail is None:
            with suppress(OSError):
                self._write_socket(alert)
        return trio.BrokenResourceError(f"TLS has failed: {error}")

    def _write_socket(self, data: bytes) -> bool:
        """Write what the kernel takes now; the tail is the rest. Returns whether there is none.

        Raises:
            OSError: the peer has disconnected, or the socket is closed.
        """
        assert self._fileno is not None
        try:
            sent = os.write(self._fileno(), data)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return True
        self.tail = memoryview(data)[sent:]
        return False

    def _send_answers(self) -> None:
        """Send what OpenSSL has to answer, now or after what is being sent."""
        if not self._outgoing.pending:
            return
        answers = self._outgoing.read()
        if not self._busy and self.tail is None:
            try:
                self._write_socket(answers)
            except OSError as error:
                raise self._broken(error) from error
            return
        waiting = b"" if self.tail is None else bytes(self.tail)
        if len(waiting) + len(answers) > PIECE + MAX_ANSWERS:
            raise trio.BrokenResourceError("the peer does not read the answers that it asks for")
        self.tail = memoryview(waiting + answers)

    def _encrypt(self, data: bytes | bytearray | memoryview) -> bytes:
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise self._failed(error) from error
        self.sent += len(data)
        return self._outgoing.read()

    def try_send(self, data: bytes) -> bool:
        if self._busy or self.tail is not None:
            return False
        for at in range(0, len(data), PIECE):
            encrypted = self._encrypt(data[at : at + PIECE])
            try:
                is_written = self._write_socket(encrypted)
            except OSError as error:
                raise self._broken(error) from error
            if not is_written:
                self._rest = memoryview(data)[at + PIECE :]
                break
        return True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._lock is None:
            self._lock = trio.Lock()
        self._busy += 1  # as in ``Transport``
        async with self._lock:
            await self._send_tail()
            rest, self._rest = self._rest, memoryview(b"")
            for part in (rest, memoryview(data)):
                for at in range(0, len(part), PIECE):
                    # Answers to the peer, which are encrypted before the next piece, go before it.
                    self.tail = memoryview(self._encrypt(part[at : at + PIECE]))
                    await self._send_tail()
        self._busy -= 1

    async def _send_tail(self) -> None:
        while self.tail is not None:
            tail, self.tail = self.tail, None
            await self.stream.send_all(tail)

    # Closing

    async def _flush_tail(self) -> None:
        if self.tail is not None and not self._busy:
            await self.flush()

    def _close_notify(self) -> None:
        """Tell the peer that nothing follows (RFC 8446, section 6.1), if nothing is being sent."""
        if self._is_closing or self._busy or self.tail is not None:
            return
        self._is_closing = True
        with suppress(ssl.SSLError):  # the peer has not done so yet, or there was no handshake
            self._tls.unwrap()
        if notice := self._outgoing.read():
            with suppress(OSError):
                self._write_socket(notice)

    async def send_eof(self) -> None:
        """Close our side."""
        await self._flush_tail()
        self._close_notify()
        await self._flush_tail()
        await self.stream.send_eof()  # type: ignore[attr-defined]  # a SocketStream

    def close_socket(self) -> bool:
        assert self._fileno is not None
        if self._fileno() != -1:
            self._close_notify()
        return super().close_socket()
