"""One TCP (or other) stream that can also be written without waiting.

Guarantee: what is handed to ``send_all`` and ``try_send`` leaves whole and in that order, whoever calls
them. A short write leaves a tail that goes before everything else, so two writers of one socket (our
frames and a WebSocket library's pongs) never tear each other's bytes.
"""

from __future__ import annotations

import os
from typing import Any

import trio

__all__ = ["Transport"]


class Transport(trio.abc.HalfCloseableStream):
    """Wraps a stream. Over a socket ``try_send`` writes at once; over any other it always refuses."""

    __slots__ = ("_busy", "_fileno", "_lock", "_pushed", "stream", "tail")

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        # The bound method, never the bare number: after a close the number may be another client's,
        # while a closed socket's fileno() is -1 and fails safely.
        self._fileno = stream.socket.fileno if isinstance(stream, trio.SocketStream) else None
        self._pushed = b""
        self.tail: memoryview | None = None
        self._busy = 0  # calls of send_all that have not ended
        self._lock: trio.Lock | None = None

    def __repr__(self) -> str:
        tail = 0 if self.tail is None else len(self.tail)
        return f"<Transport tail={tail} busy={self._busy} over {self.stream!r}>"

    @property
    def socket(self) -> Any:
        """The Trio socket underneath. Raises AttributeError if there is none."""
        return self.stream.socket  # type: ignore[attr-defined]  # that is the point

    @property
    def peer(self) -> str:
        """The address at the other end, empty if there is none."""
        return str(self.socket.getpeername()[0]) if isinstance(self.stream, trio.SocketStream) else ""

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

    async def left(self) -> None:
        """Wait until the peer ends its side; what it says until then is thrown away.

        An idle stream is parked here, so over a socket it waits for nothing but the socket: what
        ``receive_some`` keeps on its stack would be a sixth of all that the stream costs.

        Raises:
            trio.BrokenResourceError: the peer is gone.
            trio.ClosedResourceError: the transport was closed meanwhile.
        """
        if self._fileno is None:
            while await self.receive_some(4096):
                pass
            return
        self._pushed = b""
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            try:
                if not os.read(self._fileno(), 4096):
                    return
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError(f"the peer is gone: {error}") from error

    def try_send(self, data: bytes) -> bool:
        """Write without waiting, and without a task switch.

        Returns True if the transport has taken ``data``; the kernel may have left a tail of it, then
        ``pending`` is true and somebody must ``flush``. False if it can take nothing now.

        Raises:
            trio.BrokenResourceError: the peer is gone.
            trio.ClosedResourceError: the transport is closed.
        """
        if self._busy or self.tail is not None or self._fileno is None:
            return False
        try:
            sent = os.write(self._fileno(), data)
        except BlockingIOError:
            return False
        except OSError as error:
            if self._fileno() == -1:
                raise trio.ClosedResourceError("this transport is closed") from None
            raise trio.BrokenResourceError(f"the peer is gone: {error}") from error
        if sent < len(data):
            self.tail = memoryview(data)[sent:]
        return True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything; callers take turns. A cancelled call leaves the transport broken for good."""
        if self._lock is None:
            self._lock = trio.Lock()
        # Before the lock: taking it lets other tasks run, and nothing may overtake what is in hand here.
        # It stays raised when cancelled: half a frame may be out, so nothing may follow it.
        self._busy += 1
        async with self._lock:
            if self.tail is not None:
                await self.stream.send_all(self.tail)
                self.tail = None
            if data:
                await self.stream.send_all(data)
        self._busy -= 1

    async def flush(self) -> None:
        """Send the tail, if there is one."""
        await self.send_all(b"")

    async def wait_send_all_might_not_block(self) -> None:
        """Wait as the stream does."""
        await self.stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Tell the peer that nothing follows. Raises AttributeError where the stream cannot (TLS)."""
        await self.stream.send_eof()  # type: ignore[attr-defined]  # Hypercorn expects just that

    async def aclose(self) -> None:
        """Close the stream; with nothing unsent on our side the kernel still delivers what it holds."""
        await self.stream.aclose()

    async def aclose_lingering(self, seconds: float) -> None:
        """End our side, wait at most ``seconds`` for the peer to end its own, and close.

        Closing with unread bytes makes the kernel send a reset, which may overtake our last words
        (RFC 9112, section 9.6); reading them away first prevents it.
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
        await trio.aclose_forcefully(self.stream)
