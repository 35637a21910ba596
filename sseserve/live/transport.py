"""One TCP (or other) stream that can also be written without waiting.

Guarantee: what is passed to ``send_all`` and ``try_send`` is sent whole and in that order, whoever calls
them. A short write leaves a tail that is sent before everything else, so two writers of one socket (our
frames and a WebSocket library's pongs) never interleave within a frame.
"""

from __future__ import annotations

import os
import select
import socket as stdlib_socket
from typing import Any

import trio

__all__ = ["DISCONNECTED", "LINGER", "Transport", "peer_address"]

LINGER = 1.0  # seconds to wait for the peer to close after the last byte was sent

# What is raised when a peer has disconnected, or has stalled for too long.
DISCONNECTED = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)


class Transport(trio.abc.HalfCloseableStream):
    """Wraps a stream. Over a socket ``try_send`` writes at once; over any other stream it always refuses.

    Args:
        stream: the stream; or a connected socket that does not block, for which a stream is made when it is
            needed: an event stream seldom needs one.
        peer: the peer's address; None: ask the kernel for it each time.
    """

    __slots__ = (
        "_busy",
        "_fileno",
        "_lock",
        "_peer",
        "_pushed",
        "_socket",
        "_stream",
        "_waits",
        "client",
        "sent",
        "tail",
    )

    def __init__(self, stream: trio.abc.Stream | stdlib_socket.socket, peer: str | None = None) -> None:
        self._stream: trio.abc.Stream | None = None
        self._socket: stdlib_socket.socket | trio.socket.SocketType | None = None
        if isinstance(stream, stdlib_socket.socket):
            self._socket = stream
        else:
            self._stream = stream
            if isinstance(stream, trio.SocketStream):
                self._socket = stream.socket
        # The bound method, never the number: after a close the number may be another client's, while a
        # closed socket's fileno() is -1 and fails safely.
        self._fileno = None if self._socket is None else self._socket.fileno
        self._peer = peer
        self._pushed = b""
        self._waits: bool | trio.CancelScope = True  # whether ``wait_disconnected`` does, and in which scope
        self.client: tuple[str, int] | None = None  # whose connection a proxy passes on: address and port
        self.tail: memoryview | None = None
        self.sent = 0  # bytes that were passed to ``try_send`` and ``send_all`` and taken
        self._busy = 0  # calls of send_all that have not ended
        self._lock: trio.Lock | None = None

    def __repr__(self) -> str:
        tail = 0 if self.tail is None else len(self.tail)
        return f"<Transport tail={tail} busy={self._busy} over {self._stream or self._socket!r}>"

    @property
    def stream(self) -> trio.abc.Stream:
        """The stream underneath. Raises ClosedResourceError if the transport was closed without one."""
        if self._stream is None:
            assert isinstance(self._socket, stdlib_socket.socket)
            if self._socket.fileno() == -1:
                raise trio.ClosedResourceError("this transport is closed")
            self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._socket))
        return self._stream

    @property
    def socket(self) -> Any:
        """The socket underneath. Raises AttributeError if there is none."""
        return self.stream.socket if self._socket is None else self._socket  # type: ignore[attr-defined]

    @property
    def peer(self) -> str:
        """The peer's address, or that of the client whose connection it passes on; empty if there is none."""
        if self.client is not None:
            return self.client[0]
        if self._peer is not None:
            return self._peer
        if self._socket is None:
            return ""
        try:
            return peer_address(self._socket.getpeername())
        except OSError:
            return ""  # it has reset the connection already

    @property
    def immediate(self) -> bool:
        """Whether ``try_send`` can ever take anything."""
        return self._fileno is not None

    @property
    def pending(self) -> bool:
        """Whether a tail waits for ``flush``."""
        return self.tail is not None

    def push_back(self, data: bytes) -> None:
        """Put bytes in front of what the next ``receive_some`` returns."""
        self._pushed = data + self._pushed

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive as the stream does, pushed-back bytes first."""
        if self._pushed:
            await trio.lowlevel.checkpoint()
            size = len(self._pushed) if max_bytes is None else max_bytes
            data, self._pushed = self._pushed[:size], self._pushed[size:]
            return data
        return await self.stream.receive_some(max_bytes)

    def try_receive(self, max_bytes: int) -> bytes | None:
        """Receive without waiting; None: there is nothing yet, or this stream cannot say so. Empty: the end.

        Raises:
            trio.BrokenResourceError: the peer has disconnected.
            trio.ClosedResourceError: the transport is closed.
        """
        if self._pushed:
            data, self._pushed = self._pushed[:max_bytes], self._pushed[max_bytes:]
            return data
        if self._fileno is None:
            return None
        try:
            return os.read(self._fileno(), max_bytes)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._broken(error) from error

    async def receive_later(self, max_bytes: int) -> bytes:
        """Receive from a socket on which nothing is expected yet, with fewer system calls than by trying.

        Pushed-back bytes come first.

        Raises:
            trio.BrokenResourceError: the peer has disconnected.
            trio.ClosedResourceError: the transport was closed meanwhile.
        """
        while True:
            if self._pushed:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self.socket)
            if (data := self.try_receive(max_bytes)) is not None:
                return data

    def _broken(self, error: OSError) -> trio.BrokenResourceError | trio.ClosedResourceError:
        assert self._fileno is not None
        if self._fileno() == -1:
            return trio.ClosedResourceError("this transport is closed")
        return trio.BrokenResourceError(f"the peer has disconnected: {error}")

    def is_readable(self) -> bool:
        """Whether a socket, or what was pushed back, has something to receive now, be it the end."""
        if self._pushed:
            return True
        if self._fileno is None:
            return False
        poll = select.poll()
        poll.register(self._fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def wait_disconnected(self) -> bool:
        """Wait until the peer closes its side; what it sends until then is dropped.

        An idle stream waits here, so over a socket it waits for nothing but the socket: the stack of
        ``receive_some`` would be a sixth of the stream's memory, and a cancel scope would be another part.

        Returns:
            Whether it has; False: ``stop_waiting`` was called, be it before.

        Raises:
            trio.BrokenResourceError: the peer has disconnected.
            trio.ClosedResourceError: the transport was closed meanwhile.
        """
        if self._fileno is None:
            return await self._wait_end()
        self._pushed = b""
        while self._waits:
            try:
                await trio.lowlevel.wait_readable(self.socket)
                if not os.read(self._fileno(), 4096):
                    return True
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                if self._fileno() == -1:
                    raise
            except OSError as error:
                raise trio.BrokenResourceError(f"the peer has disconnected: {error}") from error
        return False

    async def _wait_end(self) -> bool:
        if not self._waits:
            return False
        with trio.CancelScope() as self._waits:
            while await self.receive_some(4096):
                pass
            return True
        return False

    def stop_waiting(self) -> None:
        """Have ``wait_disconnected`` return, now or as soon as it is called."""
        waits, self._waits = self._waits, False
        if isinstance(waits, trio.CancelScope):
            waits.cancel()
        elif self._socket is not None and self._socket.fileno() != -1:
            # This wakes whoever waits for the socket, although it stays open.
            trio.lowlevel.notify_closing(self._socket)

    def try_send(self, data: bytes) -> bool:
        """Write without waiting, and without a task switch.

        Returns True if the transport has accepted ``data``; if the kernel has left a tail of it, ``pending``
        is true and somebody must ``flush``. False if nothing can be written now.

        Raises:
            trio.BrokenResourceError: the peer has disconnected.
            trio.ClosedResourceError: the transport is closed.
        """
        if self._busy or self.tail is not None or self._fileno is None:
            return False
        try:
            sent = os.write(self._fileno(), data)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._broken(error) from error
        self.sent += sent
        if sent < len(data):
            self.tail = memoryview(data)[sent:]
        return True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything; callers take turns. A cancelled call leaves the transport unusable."""
        if self._lock is None:
            self._lock = trio.Lock()
        # Before the lock: taking it lets other tasks run, and nothing may overtake this data.
        # Not decremented when cancelled: half a frame may have been sent, so nothing may follow it.
        self._busy += 1
        async with self._lock:
            if self.tail is not None:
                await self.stream.send_all(self.tail)
                self.sent += len(self.tail)
                self.tail = None
            if data:
                await self.stream.send_all(data)
                self.sent += len(data)
        self._busy -= 1

    def pull_from(self, _source: object) -> bool:
        """Return False: who has something waiting sends it with ``send_all``."""
        return False

    async def flush(self) -> None:
        """Send the tail, if there is one."""
        await self.send_all(b"")

    async def wait_send_all_might_not_block(self) -> None:
        """Wait as the stream does."""
        await self.stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Close our side. Raises AttributeError where the stream cannot (TLS)."""
        await self.stream.send_eof()  # type: ignore[attr-defined]  # as the docstring says

    async def aclose(self) -> None:
        """Close the stream; the kernel still delivers what it holds."""
        if self._socket is None:
            await self.stream.aclose()
        else:
            self.close_socket()
            await trio.lowlevel.checkpoint()

    def close_socket(self) -> bool:
        """Do that without waiting, where there is a socket; returns whether there is."""
        if self._socket is None:
            return False
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        return True

    async def aclose_lingering(self, seconds: float) -> None:
        """Close our side, wait at most ``seconds`` for the peer to close its own, and close the stream.

        Closing with unread bytes makes the kernel send a reset, which may overtake the last bytes sent
        (RFC 9112, section 9.6); reading them first prevents it.
        """
        with trio.move_on_after(seconds):
            try:
                await self.send_eof()
                while await self.stream.receive_some(65536):
                    pass
            except (
                trio.BrokenResourceError,
                trio.ClosedResourceError,
                trio.BusyResourceError,
                AttributeError,
            ):
                pass
        if not self.close_socket():
            await trio.aclose_forcefully(self.stream)


def peer_address(name: object) -> str:
    """Return the address in the name of a socket's peer; empty if there is none: a unix socket has a path.

    An IPv4 address is returned as such, also that of a socket which serves both families (RFC 4291, 2.5.5.2).
    """
    if not isinstance(name, tuple):
        return ""
    address = str(name[0])
    mapped = address.removeprefix("::ffff:")
    return address if ":" in mapped else mapped
