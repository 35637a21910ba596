"""The watching side: thousands of streams in one epoll loop of one process.

It shares the machine with the server that it measures, so each read does little work: one ``recv_into``
into a shared buffer, a count of MARK, and a CRC. The CRC is a cheap check for lost and reordered events: a
few clients record all bytes and are checked event by event, and all others must have read identical bytes.
"""

from __future__ import annotations

import re
import select
import socket
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .process import BenchmarkError, serve_commands
from .publishers import MARK

__all__ = ["watcher_main"]

OPEN_TIMEOUT = 60.0
DRAIN_TIMEOUT = 8.0
ARRIVAL_TIMEOUT = 6.0  # if no event arrives for this long, the missing events are lost
QUIET_PERIOD = 0.25  # if no bytes arrive for this long, the streams are quiet
SOURCE_ADDRESSES = 4  # source addresses of the clients; each has its own range of ephemeral ports
RECORDED_CLIENTS = 8  # number of clients that record all bytes
PUBLISH_NUMBER = re.compile(rb'"n":[ ]?(\d+)')
TIMESTAMP = re.compile(rb'"t":[ ]?(\d+)')
OVERFLOW = b"overflow"


class Watchers:
    """The clients of one server. Counts are in lists indexed by file descriptor, faster than dicts."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._buffer = bytearray(512 * 1024)
        self._view = memoryview(self._buffer)
        self._socks: dict[int, socket.socket] = {}
        self._stalled: list[socket.socket] = []
        self._poll = select.epoll()

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return the commands that the controller may send."""
        return {
            "open": self.open,
            "discard_pending": self.discard_pending,
            "collect": self.collect,
            "drain_stalled": self.drain_stalled,
            "close": self.close,
        }

    def open(
        self,
        *,
        port: int,
        number: int,
        request: bytes,
        status: bytes,
        concurrency: int = 64,
        stalled: bool = False,
    ) -> float:
        """Open ``number`` streams, ``concurrency`` at a time.

        A stream is open once the response headers and the first bytes of the body have arrived. ``stalled``
        clients read no further. They set the segment size of Ethernet and a small receive buffer: with
        loopback's 64 KB segments the kernel would buffer more than a megabyte for each of them, and no client
        would ever stall.

        Args:
            port: TCP port of the server on 127.0.0.1.
            number: how many streams to open.
            request: the bytes of the request that opens a stream.
            status: the expected beginning of the response.
            concurrency: how many streams may be connecting at the same time.
            stalled: open clients that do not read.

        Returns:
            The time in seconds until all streams were open.

        Raises:
            BenchmarkError: a response was not the expected one, or not all streams were open in time.
        """
        poll = select.epoll()
        responses: dict[int, bytes] = {}
        opened: dict[int, socket.socket] = {}
        connecting: dict[int, socket.socket] = {}
        started = 0
        start = time.monotonic()
        while len(opened) < number:
            while started < number and len(connecting) < concurrency:
                sock, sent = _connect(port, started % SOURCE_ADDRESSES + 1, request, stalled)
                connecting[sock.fileno()] = sock
                poll.register(sock.fileno(), select.EPOLLIN if sent else select.EPOLLOUT)
                started += 1
            ready = poll.poll(1.0)
            if time.monotonic() - start > OPEN_TIMEOUT:
                raise BenchmarkError(
                    f"only {len(opened)} of {number} streams were open after {OPEN_TIMEOUT:g} s"
                )
            for fd, event in ready:
                if event == select.EPOLLOUT:
                    connecting[fd].send(request)
                    poll.modify(fd, select.EPOLLIN)
                    continue
                chunk = connecting[fd].recv(4096)
                response = responses[fd] = responses.get(fd, b"") + chunk
                body = response.partition(b"\r\n\r\n")[2]
                if not chunk or not response.startswith(status[: len(response)]):
                    raise BenchmarkError(f"unexpected response to a watch request: {response[:300]!r}")
                if body:
                    poll.unregister(fd)
                    opened[fd] = connecting.pop(fd)
        elapsed = time.monotonic() - start
        poll.close()
        if stalled:
            self._stalled += opened.values()
        else:
            self._socks.update(opened)
            for fd in opened:
                self._poll.register(fd, select.EPOLLIN)
        return elapsed

    def discard_pending(self) -> None:
        """Read and discard pending bytes until the streams are quiet."""
        deadline = time.monotonic() + OPEN_TIMEOUT
        while (ready := self._poll.poll(QUIET_PERIOD)) and time.monotonic() < deadline:
            for fd, _ in ready:
                if not self._socks[fd].recv_into(self._buffer):
                    raise BenchmarkError("a stream ended before the measurement began")

    def collect(self, *, latency: bool) -> dict[str, Any]:
        """Count events until all have arrived, or none has arrived for ``ARRIVAL_TIMEOUT`` seconds.

        When the publishers have finished, the controller sends the number of publishes of each connection
        over the pipe. With ``latency``, record how old each event is when it is read.

        Returns:
            The figures of the round. ``short`` and ``doubled`` count the clients with missing and with
            duplicate events, ``cut`` those that the server disconnected; ``last`` is the monotonic time of
            the last event, and ``cpu`` is in seconds.
        """
        size = max(self._socks) + 1
        counts, crcs = [0] * size, [0] * size
        receive: list[Any] = [None] * size
        for fd, sock in self._socks.items():
            receive[fd] = sock.recv_into
        recorded: dict[int, list[bytes]] = {fd: [] for fd in list(self._socks)[:RECORDED_CLIENTS]}
        latencies = _Latencies() if latency else None
        buffer, view, poll, crc32, mark = self._buffer, self._view, self._poll.poll, zlib.crc32, MARK
        control = self._pipe.fileno()
        self._poll.register(control, select.EPOLLIN)
        sent: list[int] | None = None
        clients = len(self._socks)
        total, target = 0, -1
        disconnected, overflowed = [], set()
        bytes_read = reads = 0
        cpu = time.process_time()
        last = time.monotonic()
        while True:
            # After the last event, wait one more quiet period for duplicates.
            ready = poll(QUIET_PERIOD if total == target else ARRIVAL_TIMEOUT)
            if not ready and sent is not None:
                break
            before = total
            for fd, _ in ready:
                if fd == control:
                    sent = self._pipe.recv()
                    target = sum(sent) * len(self._socks)
                    continue
                try:
                    n = receive[fd](buffer)
                except ConnectionResetError:
                    n = 0
                if not n:
                    disconnected.append(fd)
                    total -= counts[fd]
                    self._socks.pop(fd).close()
                    if sent is not None:
                        target = sum(sent) * len(self._socks)
                    continue
                events = buffer.count(mark, 0, n)
                counts[fd] += events
                total += events
                crcs[fd] = crc32(view[:n], crcs[fd])
                bytes_read += n
                reads += 1
                if fd in recorded:
                    recorded[fd].append(bytes(view[:n]))
                if latencies is not None:
                    latencies.record(fd, buffer[:n])
                if buffer.find(OVERFLOW, n - 256 if n > 256 else 0, n) >= 0:
                    overflowed.add(fd)
            now = time.monotonic()
            if total != before:
                last = now
            elif sent is not None and total != target and now - last > ARRIVAL_TIMEOUT:
                break
        self._poll.unregister(control)
        assert sent is not None
        connected = [fd for fd in self._socks if receive[fd] is not None]
        expected = sum(sent)
        result = {
            "clients": clients,
            "expected": expected * clients,
            "delivered": sum(counts),
            "short": sum(counts[fd] < expected for fd in connected),
            "doubled": sum(counts[fd] > expected for fd in connected),
            "cut": len(disconnected),
            "cut_by_overflow": len(overflowed & set(disconnected)),
            "identical": len({crcs[fd] for fd in connected}) <= 1,
            "in_order": all(
                _in_order(b"".join(recorded[fd]), sent) for fd in recorded if fd not in disconnected
            ),
            "last": last,
            "cpu": time.process_time() - cpu,
            "bytes": bytes_read,
            "reads": reads,
        }
        if latencies is not None:
            result |= latencies.summary()
        return result

    def drain_stalled(self) -> dict[str, int]:
        """Read from the stalled clients for at most ``DRAIN_TIMEOUT`` seconds.

        A server that disconnects no client may have a large backlog, which need not be read to the end.

        Returns:
            How many clients were disconnected (``stalled_cut``), and how many were sent the reason
            (``stalled_told``).
        """
        poll = select.epoll()
        tails = {sock.fileno(): b"" for sock in self._stalled}
        receive = {sock.fileno(): sock.recv_into for sock in self._stalled}
        for fd in tails:
            poll.register(fd, select.EPOLLIN)
        for sock in self._stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        disconnected = 0
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while (ready := poll.poll(2 * QUIET_PERIOD)) and time.monotonic() < deadline:
            for fd, _ in ready:
                try:
                    n = receive[fd](self._buffer)
                except ConnectionResetError:
                    n = 0
                if n:
                    tails[fd] = (tails[fd] + self._buffer[max(0, n - 512) : n])[-512:]
                else:
                    poll.unregister(fd)
                    disconnected += 1
        poll.close()
        return {"stalled_cut": disconnected, "stalled_told": sum(OVERFLOW in tail for tail in tails.values())}

    def close(self) -> None:
        """Reset all connections, so that no port stays in TIME_WAIT during the next round."""
        for sock in [*self._socks.values(), *self._stalled]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        self._socks.clear()
        self._stalled.clear()


class _Latencies:
    """The ages of events on arrival. An event may be split across two reads, so its first part is kept."""

    def __init__(self) -> None:
        self._incomplete: dict[int, bytes] = {}
        self._nanoseconds: list[int] = []

    def record(self, fd: int, data: bytes | bytearray) -> None:
        """Record the ages of the events in ``data``, which the client ``fd`` has just read."""
        now = time.monotonic_ns()
        if previous := self._incomplete.pop(fd, b""):
            data = previous + data
        end = data.rfind(MARK) + 1
        for match in TIMESTAMP.finditer(data, 0, end):
            self._nanoseconds.append(now - int(match[1]))
        if not data.endswith(b"\n"):
            self._incomplete[fd] = bytes(data[end:])

    def summary(self) -> dict[str, float]:
        """Return percentiles in milliseconds, and the number of events as ``timed``."""
        ages = sorted(self._nanoseconds)
        if not ages:
            raise BenchmarkError("no event arrived")
        points = {"p50": 0.50, "p99": 0.99, "p999": 0.999, "max": 1.0}
        percentiles = {
            name: ages[min(int(len(ages) * fraction), len(ages) - 1)] / 1e6
            for name, fraction in points.items()
        }
        return {**percentiles, "timed": len(ages)}


def _connect(port: int, source: int, request: bytes, stalled: bool) -> tuple[socket.socket, bool]:
    """Start to connect; return the socket and whether the request is already sent, as usual on loopback."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
    if stalled:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
    sock.bind((f"127.0.0.{source}", 0))
    sock.connect_ex(("127.0.0.1", port))
    try:
        sock.send(request)
    except BlockingIOError:
        return sock, False
    return sock, True


def _in_order(data: bytes, sent: list[int]) -> bool:
    """Return whether ``data`` has every publish exactly once, and those of each connection in order."""
    numbers = [int(digits) for digits in PUBLISH_NUMBER.findall(data)]
    connections = len(sent)
    return all(
        [n for n in numbers if n % connections == k] == list(range(k, count * connections, connections))
        for k, count in enumerate(sent)
    )


def watcher_main(pipe: Connection) -> None:
    """Run the commands of the watching process."""
    serve_commands(pipe, Watchers(pipe).commands())
