"""What one HTTP/2 connection sends (RFC 9113): responses by their windows, and in turns.

- All that is encoded has one order, and is sent whole, or the connection ends: the responses share the state
  of the header compression (RFC 7541, section 2.2), so none of it may be lost with a request that is
  cancelled.
- A response waits for its client's window; ``HIGH_WATER`` bytes of it are copied, or what its sender bounds.
- What waits for an event stream because the socket is full stays in its subscriber's buffer until its turn,
  and no task waits with it.
- What ``try_send`` can send is encoded without h2's own method, which takes ten times as long. It is written
  at once, if nothing else waits for that. Where several streams of a connection get the same few bytes, the
  frames of all but the first are one write, which a task makes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from h2.connection import ConnectionState as H2State
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError, StreamClosedError, StreamIDTooLowError
from h2.stream import H2Stream

from ..live.push_subscriber import Source
from ..live.transport import DISCONNECTED, Transport
from .http2_frames import DataFrames, FrameCountingConnection

__all__ = ["HIGH_WATER", "Outgoing", "Output"]

log = logging.getLogger(__name__)

MAX_WRITE = 64 * 1024  # bytes of responses that one write joins
LARGE = 4096  # bytes of data that are written by themselves
HIGH_WATER = 32 * 1024  # bytes of one response that may wait for its client's window


class Outgoing:
    """What waits to be sent of one stream. ``is_open``: neither its end nor a reset has been sent."""

    __slots__ = ("_changed", "buffer", "ends", "is_open", "number", "source", "stream")

    def __init__(self, number: int, stream: H2Stream) -> None:
        self.number = number
        self.stream = stream
        self.buffer = bytearray()
        self.source: Source | None = None  # of what follows, as long as that has something
        self.ends = False  # after what is in the buffer
        self.is_open = True
        self._changed: trio.lowlevel.ParkingLot | None = None

    @property
    def waits(self) -> bool:
        """Whether there is something to send."""
        return bool(self.buffer) or self.ends or self.source is not None

    @property
    def is_full(self) -> bool:
        return len(self.buffer) >= HIGH_WATER

    async def changed(self) -> None:
        """Wait until a frame is encoded, or the stream is closed."""
        self._changed = self._changed or trio.lowlevel.ParkingLot()
        await self._changed.park()

    def note_change(self) -> None:
        """Wake whoever waits for one."""
        if self._changed is not None:
            self._changed.unpark_all()

    def close(self) -> None:
        """Note that nothing more can be sent."""
        self.is_open = False
        self.source = None
        self.note_change()


class Output:
    """Sends for one connection.

    Args:
        h2: encodes.
        transport: of the connection.
        frames: the frames of what was sent last, of all connections.
        failed: is called when the connection has to end.
        send_timeout: how long one write may take, in seconds.
    """

    def __init__(
        self,
        h2: FrameCountingConnection,
        transport: Transport,
        frames: DataFrames,
        failed: Callable[[], None],
        *,
        send_timeout: float,
    ) -> None:
        self._h2 = h2
        self._transport = transport
        self._frames = frames
        self._batch = -1  # the number of the payload that was written at once
        self._failed = failed
        self._send_timeout = send_timeout
        self._outgoing: dict[int, Outgoing] = {}
        self._ready: dict[int, Outgoing] = {}  # those with something to send, in the order of their turns
        self._wakeup = trio.Event()  # there may be something to write
        self._written = trio.lowlevel.ParkingLot()  # those who wait for the end of a write
        self.is_writing = False
        self.is_over = False  # nothing more can be sent but what h2 has encoded

    def wake(self) -> None:
        """Have written what h2 has encoded."""
        self._wakeup.set()

    async def run(self) -> None:
        """Write what there is to write; returns when the client has disconnected, or has stalled."""
        while True:
            self._wakeup = trio.Event()
            try:
                while (data := self._next()) or self._transport.pending:
                    await self._write(data)
            except DISCONNECTED:
                return
            self._written.unpark_all()
            await self._wakeup.wait()

    def _next(self) -> bytes:
        """Return what one write joins; empty if there is nothing, or no window for it."""
        self._fill()
        return self._h2.data_to_send()

    async def _write(self, data: bytes) -> None:
        if data and self._transport.try_send(data):
            if self._ready:
                await trio.lowlevel.checkpoint()  # a socket may take many writes
            return
        self.is_writing = True
        with trio.fail_after(self._send_timeout):
            await self._transport.send_all(data)
        self.is_writing = False
        self._written.unpark_all()

    async def written(self) -> None:
        """Wait for the end of the write."""
        await self._written.park()

    async def flush(self) -> None:
        """Wait until all that is encoded has been written."""
        self.wake()
        while self.is_writing or self._wakeup.is_set():
            await self._written.park()

    def _fill(self) -> None:
        """Encode what the windows allow, a frame of each stream in turn, up to what one write joins."""
        size, progress = 0, not self.is_over
        while progress and size < MAX_WRITE:
            progress = False
            for number in list(self._ready):
                outgoing = self._ready.pop(number)
                if outgoing.buffer or outgoing.source is None:
                    sent = self._send_frame(outgoing)
                else:
                    sent = self._send_pulled(outgoing, outgoing.source)
                if outgoing.is_open and outgoing.waits:
                    self._ready[number] = outgoing
                size, progress = size + sent, progress or sent > 0
                if size >= MAX_WRITE:
                    break

    def _send_frame(self, outgoing: Outgoing) -> int:
        """Encode one frame of a stream; returns how many bytes of it that was."""
        number = outgoing.number
        try:
            window = self._h2.local_flow_control_window(number)
            size = max(0, min(window, self._h2.max_outbound_frame_size, len(outgoing.buffer)))
            is_end = outgoing.ends and size == len(outgoing.buffer)
            if is_end or outgoing.stream.closed:
                self._h2.send_data(number, bytes(outgoing.buffer[:size]), end_stream=is_end)
                del outgoing.buffer[:size]
            elif size:
                self._h2.append_data(outgoing.stream, outgoing.buffer, size)
        except ProtocolError:
            size, is_end = 0, True  # it is reset, or cannot go on
            self.reset(number, ErrorCodes.INTERNAL_ERROR)
        if is_end:
            outgoing.close()
        elif size:
            outgoing.note_change()
        return size

    def _send_pulled(self, outgoing: Outgoing, source: Source) -> int:
        """Encode what waits next at the source of a stream; returns how many bytes of data that was."""
        h2, stream = self._h2, outgoing.stream
        if data := source.pull(min(stream.outbound_flow_control_window, h2.outbound_flow_control_window)):
            encoded = h2.encoded
            encoded += self._frames.get(outgoing.number, data)
            h2.count_data(stream, len(data))
        else:
            outgoing.source = None
        return len(data)

    def pull(self, outgoing: Outgoing, source: Source) -> None:
        """Send what waits at a source, in the turns of its stream."""
        outgoing.source = source
        self._ready[outgoing.number] = outgoing
        self._wakeup.set()

    def open(self, outgoing: Outgoing) -> None:
        """Begin a response."""
        self._outgoing[outgoing.number] = outgoing

    def is_open(self, number: int) -> bool:
        """Whether a response has begun, and not been given up."""
        return number in self._outgoing

    def try_send(self, outgoing: Outgoing, data: bytes) -> bool:
        """Send data without waiting; False if the windows, or what waits before it, do not allow that.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the client has disconnected.
        """
        if not outgoing.is_open or self.is_over:
            raise trio.BrokenResourceError("the stream has ended")
        h2, size = self._h2, len(data)
        encoded = h2.encoded
        if (
            size > outgoing.stream.outbound_flow_control_window
            or size > h2.outbound_flow_control_window
            or len(encoded) >= MAX_WRITE
            or outgoing.buffer
        ):
            return False
        frames = self._frames.get(outgoing.number, data)
        h2.count_data(outgoing.stream, size)
        is_first, self._batch = self._batch != self._frames.batch, self._frames.batch
        if not encoded and (is_first or size >= LARGE) and self._transport.try_send(frames):
            if self._transport.tail is not None:
                self._wakeup.set()
        else:
            encoded += frames
            self._wakeup.set()
        return True

    def queue(self, number: int, data: bytes, *, ends: bool = False, may_drop: bool = False) -> None:
        """Send a part of a response when its window allows, without waiting for that.

        Args:
            number: of the stream.
            data: what follows.
            ends: nothing follows after it.
            may_drop: do nothing if the client does not read.
        """
        outgoing = self._outgoing.get(number)
        if outgoing is None or outgoing.ends or (may_drop and outgoing.is_full):
            return
        outgoing.buffer += data
        outgoing.ends = ends
        self._ready[number] = outgoing
        self._wakeup.set()

    async def send(self, number: int, data: bytes) -> None:
        """Send a part of a response, and wait until more can be sent.

        Raises:
            trio.TooSlowError: the client does not read it.
        """
        for at in range(0, len(data), HIGH_WATER):
            self.queue(number, data[at : at + HIGH_WATER])
            await self._wait_for_window(number)

    async def send_end(self, number: int) -> None:
        """Send the end of a response, and wait until that is encoded.

        Raises:
            trio.TooSlowError: the client does not read what is before it.
        """
        self.queue(number, b"", ends=True)
        await self._wait_for_window(number)

    async def _wait_for_window(self, number: int) -> None:
        outgoing = self._outgoing.get(number)
        while outgoing is not None and outgoing.is_open and (outgoing.is_full or outgoing.ends):
            with trio.fail_after(self._send_timeout):
                await outgoing.changed()

    def send_head(self, number: int, fields: list[tuple[bytes, bytes]]) -> None:
        """Encode the head of a response; if that is not possible, the connection fails."""
        if self._h2.state_machine.state is H2State.CLOSED:
            return  # by an error of the client
        try:
            self._h2.send_headers(number, fields)
        except (StreamClosedError, StreamIDTooLowError):
            return  # its client has reset it, which is about to be read
        except ProtocolError as error:
            # It may have been raised in the middle of the header block.
            log.error("the head of a response cannot be sent: %s", error)
            self.fail(ErrorCodes.INTERNAL_ERROR)
        self._wakeup.set()

    def fail(self, code: ErrorCodes) -> None:
        """End the connection with an error: what h2 knows is not what the client has been told."""
        if not self.is_over:
            self.is_over = True
            self._h2.close_connection(code)
        self._failed()

    def forget(self, number: int, code: ErrorCodes) -> None:
        """Forget a stream, and reset it if its response is not complete."""
        if (outgoing := self._outgoing.pop(number, None)) is None:
            return
        self._ready.pop(number, None)
        while outgoing.is_open and self._send_frame(outgoing):
            pass
        if outgoing.is_open:
            outgoing.close()
            self.reset(number, code)
        self._wakeup.set()

    def reset(self, number: int, code: ErrorCodes) -> None:
        """Send a reset, unless the client has sent one."""
        try:
            self._h2.reset_stream(number, code)
        except ProtocolError:
            return
        self._wakeup.set()

    def close(self) -> None:
        """Note that the connection has ended, and wake whoever waits to send."""
        self.is_over = True
        for outgoing in self._outgoing.values():
            outgoing.close()
