"""The publishing side: keep-alive connections in a closed loop, or one on a schedule, in one process.

Each request is made of a template that is built before the measurement, and is sent with one system call.
"""

from __future__ import annotations

import itertools
import re
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from .events import MAX_PLACES, first_number, payload_template, stamp
from .process import BenchmarkError, serve_commands

__all__ = ["RESPONSE_TIMEOUT", "Connection", "PublishRequest", "publisher_main"]

RESPONSE_TIMEOUT = 15.0
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
LINES = 100  # of a request with NDJSON


@dataclass(frozen=True)
class PublishRequest:
    """How a server wants an event to be published. In all fields ``*`` stands for the channel.

    Args:
        path: of the POST request.
        prefix: what precedes the payload in the body.
        suffix: what follows it.
        content_type: of the body.
        headers: further header fields, with line ends.
        is_form: the payload is percent-encoded.
    """

    path: str
    prefix: bytes = b""
    suffix: bytes = b""
    content_type: str = "application/json"
    headers: str = ""
    is_form: bool = False

    def body(self, channel: str, size: int) -> bytes:
        """Return a template of the body: complete it with ``% (number, stamp)``."""
        prefix, suffix = (
            part.replace(b"*", channel.encode()).replace(b"%", b"%%") for part in (self.prefix, self.suffix)
        )
        return prefix + payload_template(size, quoted=self.is_form) + suffix

    def head(self, channel: str, length: int) -> bytes:
        """Return the head of a request whose body has ``length`` bytes."""
        return (
            f"POST {self.path.replace('*', channel)} HTTP/1.1\r\nHost: 127.0.0.1\r\n{self.headers}"
            f"Content-Type: {self.content_type}\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def template(self, channel: str, size: int) -> bytes:
        """Return a template of the whole request: complete it with ``% (number, stamp)``."""
        body = self.body(channel, size)
        length = len(body % (first_number(0, 0), stamp(0.0)))  # always the same
        return self.head(channel, length).replace(b"%", b"%%") + body


class Connection:
    """One keep-alive connection with at most one request in flight. Its socket is blocking."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        timeout = struct.pack("ll", int(RESPONSE_TIMEOUT), 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)  # saves a poll() for each recv()
        self._pending = b""
        self._length = 0  # of the last response, if it arrived at once

    def receive(self) -> bool:
        """Read the available bytes; return whether the response is complete.

        Raises:
            BenchmarkError: the connection was closed, or the response is not 2xx or has no Content-Length.
        """
        try:
            chunk = self.sock.recv(65536)
        except BlockingIOError:
            raise BenchmarkError(f"no response to a publish request within {RESPONSE_TIMEOUT:g} s") from None
        if not chunk:
            raise BenchmarkError("the server closed a publisher's connection")
        if not self._pending and len(chunk) == self._length and chunk.startswith(b"HTTP/1.1 2"):
            return True  # as long as the one before, whose head was read
        self._pending += chunk
        head, separator, body = self._pending.partition(b"\r\n\r\n")
        if not separator:
            return False
        if not head.startswith(b"HTTP/1.1 2"):
            raise BenchmarkError(f"unexpected response to a publish request: {self._pending[:300]!r}")
        if not head.startswith(b"HTTP/1.1 204"):
            match = CONTENT_LENGTH.search(head + b"\r\n")
            if match is None:
                raise BenchmarkError(f"a response without Content-Length: {self._pending[:300]!r}")
            if len(body) < int(match[1]):
                return False
        self._length = len(self._pending) if len(self._pending) == len(chunk) else 0
        self._pending = b""
        return True

    def publish(self, request: bytes) -> None:
        """Send a request and wait for its response."""
        self.sock.sendall(request)
        while not self.receive():
            pass


class _Share:
    """The channels that a connection publishes to in turn, each with its sequence."""

    def __init__(self, request: PublishRequest, size: int, run: int, channels: list[tuple[str, int]]) -> None:
        self.sent = {sequence: 0 for _, sequence in channels}  # confirmed publishes
        self._turns = itertools.cycle(
            [
                (sequence, first_number(run, sequence), request.template(channel, size))
                for channel, sequence in channels
            ]
        )
        self._sequence = -1

    def next_request(self, moment: float | None = None) -> bytes:
        """Return the next request, whose event is to be published at a moment (by default now)."""
        self._sequence, first, template = next(self._turns)
        return template % (first + self.sent[self._sequence], stamp(moment))

    def confirm(self) -> None:
        """Count the last request, whose response has arrived."""
        self.sent[self._sequence] += 1


def publish_closed_loop(
    *,
    port: int,
    request: PublishRequest,
    size: int,
    run: int,
    shares: list[list[tuple[str, int]]],
    seconds: float,
    count: int | None = None,
) -> dict[str, Any]:
    """Publish in a closed loop for ``seconds``, or until each connection has published ``count`` events.

    Args:
        port: of the server.
        request: how to publish.
        size: of the payload, in bytes.
        run: number of the run.
        shares: for each connection, the channels that it publishes to in turn, each with its sequence.
        seconds: how long.
        count: how many events of each connection at most.

    Returns:
        The confirmed publishes of each sequence (``sent``), the monotonic time of the first publish
        (``start``), and the elapsed time and the CPU time in seconds.
    """
    publishers = {}
    poll = select.epoll()
    for channels in shares:
        connection = Connection(port)
        publishers[connection.sock.fileno()] = (connection, _Share(request, size, run, channels))
        poll.register(connection.sock, select.EPOLLIN)
    left = dict.fromkeys(publishers, MAX_PLACES if count is None else count)
    cpu, start = time.process_time(), time.monotonic()
    end = start + seconds
    for connection, share in publishers.values():
        connection.sock.sendall(share.next_request())
    active = len(publishers)
    while active:
        ready = poll.poll(RESPONSE_TIMEOUT)
        if not ready:
            raise BenchmarkError(f"no response to a publish request within {RESPONSE_TIMEOUT:g} s")
        for fd, _ in ready:
            connection, share = publishers[fd]
            if not connection.receive():
                continue
            share.confirm()
            left[fd] -= 1
            if left[fd] and time.monotonic() < end:
                connection.sock.sendall(share.next_request())
            else:
                active -= 1
                poll.unregister(fd)
    elapsed = time.monotonic() - start
    used = time.process_time() - cpu
    poll.close()
    sent: dict[int, int] = {}
    for connection, share in publishers.values():
        connection.sock.close()
        sent |= share.sent
    return {"sent": sent, "start": start, "elapsed": elapsed, "cpu": used}


def publish_paced(
    *, port: int, request: PublishRequest, size: int, run: int, channel: str, rate: float, seconds: float
) -> dict[str, Any]:
    """Publish ``rate`` events per second from one connection on a fixed schedule.

    An event has the time when it was to be published. A late response does not shift the schedule, so a slow
    server has to catch up instead of getting less load. If it cannot, publishing stops after twice
    ``seconds``.

    Returns:
        As :func:`publish_closed_loop`.
    """
    connection, share = Connection(port), _Share(request, size, run, [(channel, 0)])
    cpu, start = time.process_time(), time.monotonic() + 0.02
    for place in range(round(rate * seconds)):
        due = start + place / rate
        wait = due - time.monotonic()
        if wait > 0:
            time.sleep(wait)  # until the publish is due: this process does nothing else
        elif -wait > seconds:
            break
        connection.publish(share.next_request(due))
        share.confirm()
    elapsed = max(time.monotonic() - start, share.sent[0] / rate)  # after the last event, too, is an interval
    connection.sock.close()
    return {"sent": share.sent, "start": start, "elapsed": elapsed, "cpu": time.process_time() - cpu}


def publish_lines(
    *, port: int, request: PublishRequest, size: int, run: int, channel: str, seconds: float
) -> dict[str, Any]:
    """Publish requests with LINES events each, one line an event, from one connection in a closed loop.

    Returns:
        As :func:`publish_closed_loop`.
    """
    connection = Connection(port)
    line = request.body(channel, size) + b"\n"
    first, sent = first_number(run, 0), 0
    cpu, start = time.process_time(), time.monotonic()
    while time.monotonic() - start < seconds:
        now = stamp()
        body = b"".join([line % (first + place, now) for place in range(sent, sent + LINES)])
        connection.publish(request.head(channel, len(body)) + body)
        sent += LINES
    elapsed = time.monotonic() - start
    connection.sock.close()
    return {"sent": {0: sent}, "start": start, "elapsed": elapsed, "cpu": time.process_time() - cpu}


def publisher_main(pipe: Pipe) -> None:
    """Run the commands of the publishing process."""
    commands: dict[str, Callable[..., Any]] = {
        "publish_closed_loop": publish_closed_loop,
        "publish_paced": publish_paced,
        "publish_lines": publish_lines,
    }
    serve_commands(pipe, commands)
