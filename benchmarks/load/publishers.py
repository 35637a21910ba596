"""The publishing side: keep-alive connections in a closed loop, all in one epoll loop of one process.

The payload is one JSON object of a fixed number of bytes. ``n`` is the number of the publish: of K
connections, the one with index k sends k, k+K, k+2K..., so that a watcher can check the order of each
connection's events. ``t`` is the time of the publish in nanoseconds on the monotonic clock, which is the same
for all processes of a machine. ``pad`` begins with MARK, a byte that occurs nowhere else in a stream:
counting it counts events, even if one is split across two reads.
"""

from __future__ import annotations

import itertools
import re
import select
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .process import BenchmarkError, serve_commands

__all__ = ["MARK", "publisher_main"]

MARK = b"^"
RESPONSE_TIMEOUT = 15.0
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)


def payload(n: int, size: int) -> bytes:
    """Return the payload of publish ``n`` with the current time, padded to exactly ``size`` bytes."""
    start = b'{"n":%d,"t":%d,"pad":"%b' % (n, time.monotonic_ns(), MARK)
    return start + b"x" * (size - len(start) - 2) + b'"}'


class Publisher:
    """One keep-alive connection with at most one request in flight."""

    def __init__(
        self, port: int, path: str, prefix: bytes, suffix: bytes, size: int, headers: str = ""
    ) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=RESPONSE_TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._size, self._prefix, self._suffix = size, prefix, suffix
        length = len(prefix) + size + len(suffix)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        self._head = f"{head}{headers}Content-Length: {length}\r\n\r\n".encode()
        self._pending = b""

    def send(self, n: int) -> None:
        """Publish number ``n``."""
        self.sock.sendall(self._head + self._prefix + payload(n, self._size) + self._suffix)

    def send_to(self, session: str, n: int) -> None:
        """Publish number ``n`` to a session, whose place in the path is a ``*``."""
        head = self._head.replace(b"*", session.encode(), 1)
        self.sock.sendall(head + self._prefix + payload(n, self._size) + self._suffix)

    def receive(self) -> bool:
        """Read the available bytes; return whether the response is complete.

        Raises:
            BenchmarkError: the connection was closed, or the response is not 2xx or has no Content-Length.
        """
        chunk = self.sock.recv(65536)
        if not chunk:
            raise BenchmarkError("the server closed a publisher's connection")
        self._pending += chunk
        head, separator, body = self._pending.partition(b"\r\n\r\n")
        if not separator:
            return False
        match = CONTENT_LENGTH.search(head + b"\r\n")
        if match is None or not head.startswith(b"HTTP/1.1 2"):
            raise BenchmarkError(f"unexpected response to a publish request: {self._pending[:300]!r}")
        if len(body) < int(match[1]):
            return False
        self._pending = b""
        return True


def _connect(port: int, connections: int, size: int, request: dict[str, Any]) -> dict[int, Publisher]:
    publishers = [Publisher(port, size=size, **request) for _ in range(connections)]
    return {publisher.sock.fileno(): publisher for publisher in publishers}


def publish_closed_loop(
    *, port: int, connections: int, size: int, request: dict[str, Any], count: int | None, seconds: float
) -> dict[str, Any]:
    """Publish in a closed loop for ``seconds``, or until each connection has published ``count`` events.

    Return the number of confirmed publishes of each connection (``sent``), the monotonic time of the first
    publish (``start``), and the elapsed time and the CPU time in seconds.
    """
    publishers = _connect(port, connections, size, request)
    sent = dict.fromkeys(publishers, 0)
    offset = {fd: index for index, fd in enumerate(publishers)}
    poll = select.epoll()
    for fd in publishers:
        poll.register(fd, select.EPOLLIN)
    cpu = time.process_time()
    start = time.monotonic()
    for fd, publisher in publishers.items():
        publisher.send(offset[fd])
    active = len(publishers)
    while active:
        ready = poll.poll(RESPONSE_TIMEOUT)
        if not ready:
            raise BenchmarkError(f"no response to a publish request within {RESPONSE_TIMEOUT:g} s")
        for fd, _ in ready:
            if not publishers[fd].receive():
                continue
            sent[fd] += 1
            if time.monotonic() - start >= seconds or sent[fd] == count:
                active -= 1
                poll.unregister(fd)
            else:
                publishers[fd].send(offset[fd] + sent[fd] * connections)
    elapsed = time.monotonic() - start
    poll.close()
    for publisher in publishers.values():
        publisher.sock.close()
    return {
        "sent": list(sent.values()),
        "start": start,
        "elapsed": elapsed,
        "cpu": time.process_time() - cpu,
    }


def publish_many(
    *,
    port: int,
    connections: int,
    sessions: list[str],
    size: int,
    request: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Publish to many sessions in a closed loop, each connection to its share of them in turn.

    Each session gets the numbers 0, 1, 2... Return the number of confirmed publishes of each session
    (``sent``), the monotonic time of the first publish (``start``), and the elapsed time and the CPU time in
    seconds.
    """
    publishers = _connect(port, connections, size, request)
    shares = {fd: itertools.cycle(sessions[index::connections]) for index, fd in enumerate(publishers)}
    sent = dict.fromkeys(sessions, 0)
    current: dict[int, str] = {}
    poll = select.epoll()
    cpu = time.process_time()
    start = time.monotonic()

    def send(fd: int) -> None:
        session = current[fd] = next(shares[fd])
        publishers[fd].send_to(session, sent[session])

    for fd in publishers:
        poll.register(fd, select.EPOLLIN)
        send(fd)
    active = len(publishers)
    while active:
        ready = poll.poll(RESPONSE_TIMEOUT)
        if not ready:
            raise BenchmarkError(f"no response to a publish request within {RESPONSE_TIMEOUT:g} s")
        for fd, _ in ready:
            if not publishers[fd].receive():
                continue
            sent[current[fd]] += 1
            if time.monotonic() - start >= seconds:
                active -= 1
                poll.unregister(fd)
            else:
                send(fd)
    elapsed = time.monotonic() - start
    poll.close()
    for publisher in publishers.values():
        publisher.sock.close()
    return {"sent": sent, "start": start, "elapsed": elapsed, "cpu": time.process_time() - cpu}


def publish_at_rate(
    *, port: int, size: int, request: dict[str, Any], rate: float, seconds: float
) -> dict[str, Any]:
    """Publish ``rate`` events per second from one connection on a fixed schedule.

    A late response does not shift the schedule, so a slow server has to catch up instead of getting less
    load. If it cannot, publishing stops after twice ``seconds``. The timestamps are those of the actual
    publishes, so the latency of such a server looks better than it is, and the rate that it reached counts.

    Return the number of confirmed publishes (``sent``), the monotonic time at which the schedule begins
    (``start``), and in seconds the elapsed time and the largest delay of a publish (``late``).
    """
    (publisher,) = _connect(port, 1, size, request).values()
    total = round(rate * seconds)
    start = time.monotonic() + 0.1
    late = 0.0
    sent = 0
    for n in range(total):
        if time.monotonic() - start > 2 * seconds:
            break
        due = start + n / rate
        wait = due - time.monotonic()
        if wait > 0:
            time.sleep(wait)  # until the publish is due: this process does nothing else
        late = max(late, time.monotonic() - due)
        publisher.send(n)
        while not publisher.receive():
            pass
        sent += 1
    publisher.sock.close()
    return {"sent": [sent], "start": start, "elapsed": time.monotonic() - start, "late": late}


def publisher_main(pipe: Connection) -> None:
    """Run the commands of the publishing process."""
    commands: dict[str, Callable[..., Any]] = {
        "publish_closed_loop": publish_closed_loop,
        "publish_at_rate": publish_at_rate,
        "publish_many": publish_many,
    }
    serve_commands(pipe, commands)
