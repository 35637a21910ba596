"""Thousands of EventSource clients in one epoll loop of one process, which reconnect and check what they get.

Each does as the HTML standard says (section 9.2): when its response ends, or its connection fails, it waits
for the reconnection time and sends the id of its last event; any other status than 200 ends it for good.
The last digits of an event's number are one more than those of the event before in its session, so a client
knows what is missing.
"""

from __future__ import annotations

import heapq
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from sseserve.sse import Decoder

from .events import MAX_PLACES
from .process import BenchmarkError, serve_commands

__all__ = ["event_sources_main"]

OPEN_TIMEOUT = 60.0
RETRY = 3000  # milliseconds before an EventSource in Chromium reconnects, unless the server says otherwise
CONCURRENCY = 64  # clients that may be opening their first stream at the same time
SOURCE_ADDRESSES = 4  # source addresses of the clients; each has its own range of ephemeral ports
NUMBER = re.compile(r'"n":(\d+)')


class EventSource:
    """One client of one session."""

    def __init__(self, session: str, source: int) -> None:
        self.session = session
        self.sock: socket.socket | None = None
        self.decoder = Decoder()
        self.is_open = False
        self.next = 0  # the number of the next event, if none is missing
        self.missing: set[int] = set()
        self.received = self.doubled = self.reordered = 0
        self._source = source
        self._head: bytes | None = b""  # of the response, until it is complete

    def connect(self, port: int) -> socket.socket:
        """Begin to connect; the socket becomes writable when the request can be sent."""
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
        self.sock.bind((f"127.0.0.{self._source}", 0))
        self.sock.connect_ex(("127.0.0.1", port))
        self._head = b""
        return self.sock

    def request(self) -> bytes:
        """Return the request. HTTP/1.0: the body has no chunks, and ends with the connection."""
        cursor = self.decoder.last_event_id
        return (
            f"GET /api/sessions/{self.session}/status/stream HTTP/1.0\r\nHost: 127.0.0.1\r\n"
            + (f"Last-Event-ID: {cursor}\r\n" if cursor else "")
            + "\r\n"
        ).encode()

    def feed(self, data: bytes, told: Counter[str]) -> str | None:
        """Take bytes of the response; return its status line if the client must give up.

        What the server says about the stream is counted in ``told``.
        """
        if self._head is not None:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                return None
            if head.split(b" ")[1] != b"200":
                return head.partition(b"\r\n")[0].decode()
            self._head, self.is_open = None, True
            self.decoder = Decoder(last_event_id=self.decoder.last_event_id, retry=self.decoder.retry)
        for event in self.decoder.feed(data):
            if event.event == "tick" and (match := NUMBER.search(event.data)):
                self._take(int(match[1]) % MAX_PLACES)
            elif event.event == "resume":
                told["resumed " + event.data.partition('"status":"')[2].partition('"')[0]] += 1
            elif event.event in ("degraded", "restored"):
                told[event.event] += 1
        return None

    def _take(self, number: int) -> None:
        self.received += 1
        if number >= self.next:
            self.missing.update(range(self.next, number))
            self.next = number + 1
        elif number in self.missing:
            self.missing.remove(number)
            self.reordered += 1
        else:
            self.doubled += 1


class EventSources:
    """The clients, and the loop that they run in."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._poll = select.epoll()
        self._clients: list[EventSource] = []
        self._connected: dict[int, EventSource] = {}
        self._waiting: list[tuple[float, int, EventSource]] = []  # a heap of the times to connect
        self._open = 0
        self._told: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._reconnections = 0
        self._last = 0.0  # the monotonic time of the last event

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return the commands that the controller may send."""
        return {"open": self.open, "watch": self.watch}

    def open(self, *, port: int, sessions: list[str], number: int) -> None:
        """Open ``number`` streams, spread over the sessions.

        Raises:
            BenchmarkError: not all of them were open in time.
        """
        self._port = port
        deadline = time.monotonic() + OPEN_TIMEOUT
        while self._open < number and not self._refused:
            while len(self._clients) < number and len(self._clients) < self._open + CONCURRENCY:
                index = len(self._clients)
                client = EventSource(sessions[index % len(sessions)], index % SOURCE_ADDRESSES + 1)
                self._clients.append(client)
                self._connect(client)
            self._step(1.0)
            if time.monotonic() > deadline:
                break
        if self._open < number:
            refused = dict(self._refused) or "no response"
            raise BenchmarkError(f"only {self._open} of {number} streams were opened: {refused}")

    def watch(self, *, patience: float = 10.0) -> dict[str, Any]:
        """Read until the controller has sent how many events each session has, and all have arrived.

        If nothing arrives for ``patience`` seconds then, what is missing is lost.
        Before that it may send None, and gets the number of clients that wait for a stream at that time; or
        the numbers of events that each session has so far, in a tuple, and gets the monotonic time when all
        clients have them.
        """
        self._poll.register(self._pipe.fileno(), select.EPOLLIN)
        cpu, expected, partial, known_at = time.process_time(), None, None, 0.0
        while expected is None or time.monotonic() < max(self._last, known_at) + patience:
            self._step(0.5)
            if expected is None and self._pipe.poll():
                message = self._pipe.recv()
                if message is None:
                    self._pipe.send((True, len(self._connected) + len(self._waiting) - self._open))
                elif isinstance(message, tuple):
                    (partial,) = message
                else:
                    expected, known_at = message, time.monotonic()
            if partial is not None and self._have(partial):
                self._pipe.send((True, time.monotonic()))
                partial = None
            if expected is not None and self._have(expected):
                break
        for client in self._clients:
            client.missing.update(range(client.next, expected[client.session]))
        return {
            "lost": [len(client.missing) for client in self._clients],
            "doubled": [client.doubled for client in self._clients],
            "reordered": [client.reordered for client in self._clients],
            "told": dict(self._told),
            "refused": dict(self._refused),
            "reconnections": self._reconnections,
            "last": self._last,
            "cpu": time.process_time() - cpu,
        }

    def _have(self, counts: dict[str, int]) -> bool:
        return all(client.next >= counts[client.session] and not client.missing for client in self._clients)

    def _step(self, timeout: float) -> None:
        """Do what is to be done now; wait at most ``timeout`` seconds for it."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            self._reconnections += 1
            self._connect(heapq.heappop(self._waiting)[2])
        if self._waiting:
            timeout = min(timeout, self._waiting[0][0] - now)
        for fd, event in self._poll.poll(timeout):
            client = self._connected.get(fd)
            if client is None:
                continue  # the pipe
            try:
                if event & select.EPOLLOUT and not event & (select.EPOLLERR | select.EPOLLHUP):
                    client.sock.send(client.request())
                    self._poll.modify(fd, select.EPOLLIN)
                    continue
                data = client.sock.recv(65536)
            except OSError:
                data = b""
            was_open = client.is_open
            received = client.received
            status = client.feed(data, self._told) if data else None
            if client.received > received:
                self._last = time.monotonic()
            self._open += client.is_open - was_open
            if status is not None:
                self._refused[status] += 1
                self._disconnect(fd, client)
            elif not data:
                self._disconnect(fd, client)
                retry = RETRY if client.decoder.retry is None else client.decoder.retry
                heapq.heappush(self._waiting, (time.monotonic() + retry / 1000, id(client), client))

    def _connect(self, client: EventSource) -> None:
        fd = client.connect(self._port).fileno()
        self._connected[fd] = client
        self._poll.register(fd, select.EPOLLOUT)

    def _disconnect(self, fd: int, client: EventSource) -> None:
        self._poll.unregister(fd)
        del self._connected[fd]
        client.sock.close()
        self._open -= client.is_open
        client.is_open = False


def event_sources_main(pipe: Connection) -> None:
    """Run the commands of the process of the clients."""
    serve_commands(pipe, EventSources(pipe).commands())
