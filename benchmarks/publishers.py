"""The publishing side: keep-alive connections in a closed loop, all in one epoll loop of one process.

The payload is one JSON object of a fixed number of bytes. ``n`` numbers the publishes: of K connections,
the one with index k sends k, k+K, k+2K..., so that a watcher can check order per publisher. ``t`` is the
moment of the publish on the monotonic clock, which is the same for all processes of a machine. The pad
begins with MARK, a byte that occurs nowhere else in a stream: counting it counts events, even if one is
split over two reads.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from process import BenchError, serve_commands

__all__ = ["MARK", "publisher_main"]

MARK = b"^"
ANSWER_LIMIT = 15.0
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)


def payload(n: int, size: int) -> bytes:
    """Return publish ``n``, stamped with the present moment, ``size`` bytes long whatever its numbers are."""
    start = b'{"n":%d,"t":%d,"pad":"%b' % (n, time.monotonic_ns(), MARK)
    return start + b"x" * (size - len(start) - 2) + b'"}'


class Publisher:
    """One keep-alive connection; at most one request is on its way."""

    def __init__(self, port: int, path: str, before: bytes, after: bytes, size: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_LIMIT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._size, self._before, self._after = size, before, after
        length = len(before) + size + len(after)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        self._head = f"{head}Content-Length: {length}\r\n\r\n".encode()
        self._pending = b""

    def send(self, n: int) -> None:
        """Publish number ``n``."""
        self.sock.sendall(self._head + self._before + payload(n, self._size) + self._after)

    def receive(self) -> bool:
        """Read what is there; return whether the answer is complete.

        Raises:
            BenchError: the server refused, hung up, or does not say how long its answer is.
        """
        chunk = self.sock.recv(65536)
        if not chunk:
            raise BenchError("the server closed a publisher's connection")
        self._pending += chunk
        head, end, body = self._pending.partition(b"\r\n\r\n")
        if not end:
            return False
        found = LENGTH.search(head + b"\r\n")
        if found is None or not head.startswith(b"HTTP/1.1 2"):
            raise BenchError(f"a publish was answered {self._pending[:300]!r}")
        if len(body) < int(found[1]):
            return False
        self._pending = b""
        return True


def _connect(port: int, connections: int, size: int, way: dict[str, Any]) -> dict[int, Publisher]:
    publishers = [Publisher(port, size=size, **way) for _ in range(connections)]
    return {publisher.sock.fileno(): publisher for publisher in publishers}


def flood(
    *, port: int, connections: int, size: int, way: dict[str, Any], count: int | None, seconds: float
) -> dict[str, Any]:
    """Publish in a closed loop until ``seconds`` have passed or each connection has sent ``count``.

    Return how many each connection has had confirmed, when the first was sent, and the CPU seconds used.
    """
    publishers = _connect(port, connections, size, way)
    sent = dict.fromkeys(publishers, 0)
    offset = {fd: index for index, fd in enumerate(publishers)}
    poll = select.epoll()
    for fd in publishers:
        poll.register(fd, select.EPOLLIN)
    cpu = time.process_time()
    start = time.monotonic()
    for fd, publisher in publishers.items():
        publisher.send(offset[fd])
    waiting = len(publishers)
    while waiting:
        ready = poll.poll(ANSWER_LIMIT)
        if not ready:
            raise BenchError(f"a publish was not answered within {ANSWER_LIMIT:g} s")
        for fd, _ in ready:
            if not publishers[fd].receive():
                continue
            sent[fd] += 1
            if time.monotonic() - start >= seconds or sent[fd] == count:
                waiting -= 1
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


def pace(*, port: int, size: int, way: dict[str, Any], rate: float, seconds: float) -> dict[str, Any]:
    """Publish ``rate`` events a second from one connection, at moments fixed beforehand.

    A late answer does not shift the moments after it, so a slow server catches up rather than thins out its
    load. One that cannot is given up on after twice the time: the stamps are those of the publishes, so its
    latency looks better than it is, and what tells is the rate that was reached.
    """
    (publisher,) = _connect(port, 1, size, way).values()
    number = round(rate * seconds)
    start = time.monotonic() + 0.1
    late = 0.0
    sent = 0
    for n in range(number):
        if time.monotonic() - start > 2 * seconds:
            break
        due = start + n / rate
        wait = due - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        late = max(late, time.monotonic() - due)
        publisher.send(n)
        while not publisher.receive():
            pass
        sent += 1
    publisher.sock.close()
    return {"sent": [sent], "start": start, "elapsed": time.monotonic() - start, "late": late}


def publisher_main(pipe: Connection) -> None:
    """Run the publishing process."""
    commands: dict[str, Callable[..., Any]] = {"flood": flood, "pace": pace}
    serve_commands(pipe, commands)
