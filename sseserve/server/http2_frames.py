"""The protocol of one HTTP/2 connection: h2, DATA frames, and a limit of frames that carry nothing. No I/O.

A client can send a hundred thousand frames that carry nothing in a second, each of them valid: resets of
requests that it has just made (CVE-2023-44487), offences for which the server has to reset (CVE-2025-8671),
pings, settings, priorities and empty DATA (CVE-2019-9512, 9513, 9515 and 9518). Beyond ``FRAMES`` the
connection ends with ENHANCE_YOUR_CALM (RFC 9113, section 10.5). h2 itself limits the requests that are open,
and the frames and the decoded size of a header block; but it waits for the whole of a frame, of up to 16 MB,
before it refuses its length.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated
from h2.events import Event as H2Event
from h2.exceptions import DenialOfServiceError
from h2.frame_buffer import FrameBuffer
from h2.stream import H2Stream
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

__all__ = ["FRAMES", "RATE", "DataFrames", "FrameCountingConnection"]

FRAMES = 300  # at once
RATE = 50.0  # per second, beyond those
LENGTH = 3  # bytes of a frame's header that are its length
ANSWERS = 3  # to each frame of data that a client gets, which are not counted
MAX_FRAME = 16 * 1024  # bytes of data in one; all clients accept as many (RFC 9113, section 4.2)
MAX_KNOWN = 512 * 1024  # bytes of the frames of one payload that are kept


class _FrameBuffer(FrameBuffer):
    """Keeps no more than a frame, and a header block, of the size that the client was told."""

    max_header_block = 0

    def __next__(self) -> Frame:
        if len(self._data) >= LENGTH:
            self._validate_frame_length(int.from_bytes(self._data[:LENGTH]))
        return super().__next__()

    def _update_header_buffer(self, f: Frame | None) -> Frame | None:
        complete = super()._update_header_buffer(f)
        if sum(len(part.data) for part in self._headers_buffer) > self.max_header_block:
            raise DenialOfServiceError("the header block is too large")
        return complete

    @property
    def waits_for_head(self) -> bool:
        """Whether header fields, or any frame but DATA, have begun and are not complete."""
        return bool(self._preamble_len or self._headers_buffer or (self._data and self._data[3:4] != b"\0"))


class FrameCountingConnection(H2Connection):
    """h2's connection of a server.

    After a client's GOAWAY its streams go on (RFC 9113, section 6.8). h2 sends nothing any more. Node.js
    sends it as soon as a session is told to close, which it is often right after its last request.

    Args:
        config: h2's.
        clock: returns seconds.
        max_header_block: its limit in bytes, encoded or decoded.
    """

    def __init__(self, config: H2Configuration, clock: Callable[[], float], *, max_header_block: int) -> None:
        super().__init__(config)
        self._frames = self.incoming_buffer = _FrameBuffer(server=True)
        self._frames.max_header_block = self.decoder.max_header_list_size = max_header_block
        self._has_settings = False
        self._clock = clock
        self._left = float(FRAMES)
        self._counted_at = clock()
        self._answers = 0  # that are not counted

    @property
    def waits_for_head(self) -> bool:
        """Whether the preface, with its SETTINGS, or the head of a request has begun and is not complete."""
        return not self._has_settings or self._frames.waits_for_head

    def _receive_frame(self, frame: Frame) -> list[H2Event]:
        self._has_settings = self._has_settings or isinstance(frame, SettingsFrame)
        if self._is_answer(frame) and self._answers:
            self._answers -= 1
        elif _carries_nothing(frame) and not self._has_response(frame):
            self._left -= 1
        events = super()._receive_frame(frame)
        if self._left < 0:
            now = self._clock()
            self._left = min(float(FRAMES), self._left + (now - self._counted_at) * RATE)
            self._counted_at = now
            if self._left < 0:
                raise DenialOfServiceError("too many frames that carry nothing")
        return events

    def _is_answer(self, frame: Frame) -> bool:
        """Whether it may be what a client sends because of data: more window, or that it has left already."""
        is_reset = isinstance(frame, RstStreamFrame) and frame.stream_id not in self.streams
        return is_reset or isinstance(frame, WindowUpdateFrame)

    def _has_response(self, frame: Frame) -> bool:
        """Whether it resets a stream that the client has a response of, as it leaves an event stream."""
        stream = self.streams.get(frame.stream_id) if isinstance(frame, RstStreamFrame) else None
        return stream is not None and bool(stream.state_machine.headers_sent)

    def _prepare_for_sending(self, frames: list[Frame]) -> None:
        super()._prepare_for_sending(frames)
        for frame in frames:
            if isinstance(frame, DataFrame):
                self._answers += ANSWERS
            elif isinstance(frame, RstStreamFrame):
                self._left -= 1  # what a client has done wrong costs as much as what it resets itself

    @property
    def encoded(self) -> bytearray:
        """What has been encoded, in its order, and not been taken with ``data_to_send``."""
        return self._data_to_send

    def count_data(self, stream: H2Stream, size: int) -> None:
        """Note that a frame of data is appended to ``encoded``, or sent where that is empty."""
        stream.outbound_flow_control_window -= size
        self.outbound_flow_control_window -= size
        self._answers += ANSWERS

    def append_data(self, stream: H2Stream, buffer: bytearray, size: int) -> None:
        """Encode a frame of the first bytes of a buffer, which are taken from it; without ``send_data``."""
        self._data_to_send += _HEADER(size << 8, 0, stream.stream_id)
        self._data_to_send += buffer[:size]
        del buffer[:size]
        self.count_data(stream, size)

    def announce_end(self, last_stream: int) -> None:
        """Tell the client that no request after that one is served; its other streams go on."""
        self._data_to_send += GoAwayFrame(0, last_stream_id=last_stream).serialize()

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[H2Event]]:
        event = ConnectionTerminated()
        event.error_code = frame.error_code
        return [], [event]


def _carries_nothing(frame: Frame) -> bool:
    match frame:
        case DataFrame():
            return not frame.data and "END_STREAM" not in frame.flags
        case HeadersFrame() | GoAwayFrame():
            return False
        case SettingsFrame() | PingFrame():
            return "ACK" not in frame.flags
    return True


class DataFrames:
    """The DATA frames of the payload that was sent last (RFC 9113, section 6.1), for all connections.

    Most have few streams, of the same numbers, so that many of their frames are the same, too.
    """

    def __init__(self) -> None:
        self._payload = b""
        self._known: dict[int, bytes] = {}
        self._left = 0  # bytes that may be kept
        self.batch = 0  # counts the payloads

    def get(self, number: int, payload: bytes) -> bytes:
        """Return the frames of a payload on the stream of a number, each as small as all clients accept it.

        As long as ``payload`` is the same object, ``batch`` stays the same.
        """
        if payload is not self._payload:
            self._payload, self._known, self._left = payload, {}, MAX_KNOWN
            self.batch += 1
        elif (frames := self._known.get(number)) is not None:
            return frames
        if (size := len(payload)) <= MAX_FRAME:
            frames = _HEADER(size << 8, 0, number) + payload
        else:
            parts = [payload[at : at + MAX_FRAME] for at in range(0, size, MAX_FRAME)]
            frames = b"".join([_HEADER(len(part) << 8, 0, number) + part for part in parts])
        if self._left >= size:
            self._left -= size
            self._known[number] = frames
        return frames


_HEADER = struct.Struct("!IBI").pack  # the length with the type DATA (0), the flags, the stream
