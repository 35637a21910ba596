"""The watching side over HTTP/2: connections with one event stream or many, which check what they get.

As in ``watchers`` each read does little work: what connections have read alike is parsed once. So a
connection is a sans-IO reader of frames (RFC 9113, section 4.1) that knows only what event streams need. The
windows are those of Chromium, and are opened again when half of them is used.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Hashable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import hpack

from .events import Position
from .process import BenchmarkError, serve_commands

__all__ = ["Reading", "frame", "http2_watcher_main"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM = ACK = 1
END_HEADERS = 4
HEADER = 9  # bytes of a frame's header
INITIAL_WINDOW_SIZE = 4  # the setting
STREAM_WINDOW = 6 * 2**20
CONNECTION_WINDOW = 15 * 2**20
FIRST_WINDOW = 65_535  # of a connection (RFC 9113, section 6.9.2)
OPEN_TIMEOUT = 90.0
QUIET_PERIOD = 0.25  # if no bytes arrive for this long, the streams are quiet
CONCURRENCY = 64  # streams that are opened at the same time

_Known = WeakValueDictionary[Hashable, "Reading"]


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Encode a frame."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def _window_update(stream: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack("!I", size))


class Piece(NamedTuple):
    """What a read has brought.

    Attributes:
        after: what the connection has read then.
        gained: events.
        reply: what the client has to send because of it.
    """

    after: Reading
    gained: int
    reply: bytes


class Reading:
    """What a connection has read so far. Immutable, and shared by all that have read the same.

    Those which have read it in other pieces share it too, so that connections which were behind are again
    like the others as soon as they have caught up.
    """

    __slots__ = ("__weakref__", "_known", "_rest", "_used", "bodies", "ended", "following", "streams")

    def __init__(self, streams: dict[int, Position]) -> None:
        self._rest = b""
        self._used: dict[int, int] = {}  # bytes of each window, with 0 for the connection's
        self._known = _Known()
        self.streams = streams
        self.bodies: frozenset[int] = frozenset()  # the streams that have got data
        self.ended = 0  # streams, or the connection
        self.following: dict[bytes, Piece] = {}

    def restart(self, position: Position, known: _Known) -> Reading:
        """Return the same with all streams at a position; ``known``: what begins like this, by its state."""
        after = self._copy()
        after.streams = dict.fromkeys(self.streams, position)
        after._known = known
        return known.setdefault(after._state, after)

    def _copy(self) -> Reading:
        after = Reading(dict(self.streams))
        after._rest, after._used, after._known = self._rest, dict(self._used), self._known
        after.bodies, after.ended = self.bodies, self.ended
        return after

    def advance(self, piece: bytes) -> Piece:
        """Return what ``piece``, the next bytes of the connection, brings."""
        after = self._copy()
        data = self._rest + piece
        at, gained, reply, bodies = 0, 0, b"", set()
        while len(data) - at >= HEADER:
            size = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            end = at + HEADER + size
            if len(data) < end:
                break
            kind, flags, number = struct.unpack_from("!BBI", data, at + 3)
            if kind == DATA:
                payload = data[at + HEADER : end]
                position = after.streams[number]
                position = position.following.get(payload) or position.advance(payload)
                after.streams[number] = position
                gained += position.gained
                bodies.add(number)
                reply += after._release(number, size, STREAM_WINDOW) + after._release(
                    0, size, CONNECTION_WINDOW
                )
            if kind in (SETTINGS, PING) and not flags & ACK:
                reply += frame(kind, ACK, 0, data[at + HEADER : end] if kind == PING else b"")
            if kind in (RST_STREAM, GOAWAY) or (kind in (DATA, HEADERS) and flags & END_STREAM):
                after.ended += 1
            at = end
        after._rest = data[at:]
        if not bodies <= after.bodies:
            after.bodies |= bodies
        after = self._known.setdefault(after._state, after)
        result = self.following[piece] = Piece(after, gained, reply)
        return result

    @property
    def _state(self) -> Hashable:
        streams = tuple([(number, position.state) for number, position in self.streams.items()])
        return streams, self._rest, tuple(self._used.items()), self.bodies, self.ended

    def _release(self, number: int, size: int, window: int) -> bytes:
        used = self._used.get(number, 0) + size
        self._used[number] = 0 if 2 * used >= window else used
        return b"" if 2 * used < window else _window_update(number, used)


class Http2Watchers:
    """The clients of one server that one process has, by file descriptor."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._buffer = bytearray(512 * 1024)
        self._view = memoryview(self._buffer)
        self._socks: dict[int, socket.socket] = {}
        self._readings: dict[int, Reading] = {}
        self._poll = select.epoll()

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return the commands that the controller may send."""
        return {"open": self.open, "collect": self.collect, "close": self.close}

    def open(self, *, port: int, path: str, connections: int, streams: int) -> dict[str, float]:
        """Open connections with ``streams`` streams each; at most about ``CONCURRENCY`` streams are opening.

        A stream is open once the first bytes of its body have arrived.

        Returns:
            The time until all were open (``seconds``).

        Raises:
            BenchmarkError: a stream has ended, or not all were open in time.
        """
        numbers = range(1, 2 * streams, 2)
        encoder = hpack.Encoder()
        encoder.header_table_size = 0  # so that all streams have the same header block
        fields = {":method": "GET", ":scheme": "http", ":authority": f"127.0.0.1:{port}", ":path": path}
        block = encoder.encode(list(fields.items()))
        request = (
            PREFACE
            + frame(SETTINGS, 0, 0, struct.pack("!HI", INITIAL_WINDOW_SIZE, STREAM_WINDOW))
            + _window_update(0, CONNECTION_WINDOW - FIRST_WINDOW)
            + b"".join([frame(HEADERS, END_HEADERS | END_STREAM, number, block) for number in numbers])
        )
        first = Reading(dict.fromkeys(numbers, Position(0, ())))
        began = time.monotonic()
        opened = started = 0
        while opened < connections:
            while started < connections and (started == opened or (started - opened) * streams < CONCURRENCY):
                sock = socket.create_connection(("127.0.0.1", port))
                sock.setblocking(False)
                sock.sendall(request)
                self._socks[sock.fileno()] = sock
                self._readings[sock.fileno()] = first
                self._poll.register(sock, select.EPOLLIN)
                started += 1
            for fd, _ in self._poll.poll(1.0):
                was_open = len(self._readings[fd].bodies) == streams
                piece = self._read(fd)
                if piece is None or piece.after.ended:
                    raise BenchmarkError("a stream ended while it was opened")
                opened += len(piece.after.bodies) == streams and not was_open
            if time.monotonic() > began + OPEN_TIMEOUT:
                raise BenchmarkError(f"only {opened} of {connections} connections were open in time")
        seconds = time.monotonic() - began
        while ready := self._poll.poll(QUIET_PERIOD):
            for fd, _ in ready:
                self._read(fd)
        return {"seconds": seconds}

    def _read(self, fd: int) -> Piece | None:
        """Read once; returns None at the end of the connection."""
        try:
            size = self._socks[fd].recv_into(self._buffer)
        except ConnectionResetError:
            size = 0
        if not size:
            return None
        data = bytes(self._view[:size])
        before = self._readings[fd]
        piece = before.following.get(data) or before.advance(data)
        self._readings[fd] = piece.after
        if piece.reply:
            self._socks[fd].sendall(piece.reply)
        return piece

    def collect(self, *, run: int, sequences: int, patience: float) -> dict[str, Any]:
        """Take events until all have arrived, or none has arrived for ``patience`` seconds.

        When the publishers have finished, the controller sends the number of publishes of each sequence over
        the pipe. Returns what ``Watchers.collect`` does, without latencies.
        """
        known, first = _Known(), Position(run, range(sequences))
        self._readings = {fd: reading.restart(first, known) for fd, reading in self._readings.items()}
        control = self._pipe.fileno()
        self._poll.register(control, select.EPOLLIN)
        streams = sum(len(reading.streams) for reading in self._readings.values())
        sent: dict[int, int] | None = None
        total, target, disconnected = 0, -1, 0
        cpu, last = time.process_time(), time.monotonic()
        while True:
            # After the last event, wait one more quiet period for duplicates.
            ready = self._poll.poll(QUIET_PERIOD if total == target else patience, 4096)
            if not ready and sent is not None:
                break
            before = total
            for fd, _ in ready:
                if fd == control:
                    sent = self._pipe.recv()
                    target = streams * sum(sent.values())
                elif (piece := self._read(fd)) is None:
                    disconnected += 1
                    self._poll.unregister(fd)
                else:
                    total += piece.gained
            if total != before:
                last = time.monotonic()
        self._poll.unregister(control)
        assert sent is not None
        positions = [p for reading in self._readings.values() for p in reading.streams.values()]
        counts = {
            "lost": sum(position.lost(sent) for position in positions),
            "doubled": sum(position.doubled for position in positions),
            "reordered": sum(position.reordered for position in positions),
            "ended": disconnected + sum(reading.ended for reading in self._readings.values()),
        }
        return {
            "delivered": total,
            "faults": [f"{what}: {count}" for what, count in counts.items() if count],
            "last": last,
            "cpu": time.process_time() - cpu,
        }

    def close(self) -> None:
        """Reset all connections, so that no port stays in TIME_WAIT during the next round."""
        for sock in self._socks.values():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        self._socks.clear()
        self._readings.clear()


def http2_watcher_main(pipe: Connection) -> None:
    """Run the commands of a watching process."""
    serve_commands(pipe, Http2Watchers(pipe).commands())
