"""The watching side: thousands of streams in one epoll loop of one process.

It shares the machine with the server it measures, so it does as little as it can for each read: one
``recv_into`` into one buffer, a count of MARK, and a CRC. The CRC is what makes the check of "no loss, in
order" cheap: some clients keep all they read and are checked event by event, and the others must have read
the very same bytes.
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

from process import BenchError, serve_commands
from publishers import MARK

__all__ = ["watcher_main"]

OPEN_LIMIT = 60.0
DRAIN_LIMIT = 8.0
STUCK_LIMIT = 6.0  # nothing arrives for that long, and something is missing: it is lost
QUIET = 0.25
SOURCES = 4  # addresses that the clients come from; each has ephemeral ports of its own
KEPT = 8  # clients that keep all they read
NUMBER = re.compile(rb'"n":[ ]?(\d+)')
STAMP = re.compile(rb'"t":[ ]?(\d+)')
OVERFLOW = b"overflow"


class Watchers:
    """The clients of one server. All counts are by file descriptor, in lists: the cheapest map there is."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._buffer = bytearray(512 * 1024)
        self._view = memoryview(self._buffer)
        self._socks: dict[int, socket.socket] = {}
        self._stalled: list[socket.socket] = []
        self._poll = select.epoll()

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Return what the controller may ask for."""
        return {
            "open": self.open,
            "settle": self.settle,
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
        window: int = 64,
        stalled: bool = False,
    ) -> float:
        """Open streams, ``window`` at a time; return the seconds until each has its head and first bytes.

        ``stalled`` ones are read no further. They ask for the segment size of an Ethernet and a small
        receive buffer: with loopback's 64 KB segments the kernel alone would take more than a megabyte for
        each of them, and nothing would ever stall.
        """
        poll = select.epoll()
        heads: dict[int, bytes] = {}
        opened: dict[int, socket.socket] = {}
        going: dict[int, socket.socket] = {}
        started = 0
        start = time.monotonic()
        while len(opened) < number:
            while started < number and len(going) < window:
                sock, sent = _begin(port, started % SOURCES + 1, request, stalled)
                going[sock.fileno()] = sock
                poll.register(sock.fileno(), select.EPOLLIN if sent else select.EPOLLOUT)
                started += 1
            ready = poll.poll(1.0)
            if time.monotonic() - start > OPEN_LIMIT:
                raise BenchError(f"{len(opened)} of {number} streams were open after {OPEN_LIMIT:g} s")
            for fd, event in ready:
                if event == select.EPOLLOUT:
                    going[fd].send(request)
                    poll.modify(fd, select.EPOLLIN)
                    continue
                chunk = going[fd].recv(4096)
                head = heads[fd] = heads.get(fd, b"") + chunk
                body = head.partition(b"\r\n\r\n")[2]
                if not chunk or not head.startswith(status[: len(head)]):
                    raise BenchError(f"a stream was answered {head[:300]!r}")
                if body:
                    poll.unregister(fd)
                    opened[fd] = going.pop(fd)
        elapsed = time.monotonic() - start
        poll.close()
        if stalled:
            self._stalled += opened.values()
        else:
            self._socks.update(opened)
            for fd in opened:
                self._poll.register(fd, select.EPOLLIN)
        return elapsed

    def settle(self) -> None:
        """Read and forget what is still on its way, until nothing has come for a moment."""
        end = time.monotonic() + OPEN_LIMIT
        while (ready := self._poll.poll(QUIET)) and time.monotonic() < end:
            for fd, _ in ready:
                if not self._socks[fd].recv_into(self._buffer):
                    raise BenchError("a stream ended before the measurement began")

    def collect(self, *, latency: bool) -> dict[str, Any]:
        """Count what arrives until all that the controller says was sent is there, or nothing moves any more.

        The controller sends ``sent``, the number of publishes of each connection, over the same pipe when it
        knows it. With ``latency`` the age of each event is taken when its bytes have been read.
        """
        size = max(self._socks) + 1
        counts, crcs = [0] * size, [0] * size
        receive: list[Any] = [None] * size
        for fd, sock in self._socks.items():
            receive[fd] = sock.recv_into
        kept: dict[int, list[bytes]] = {fd: [] for fd in list(self._socks)[:KEPT]}
        ages = _Ages() if latency else None
        buffer, view, poll, crc32, mark = self._buffer, self._view, self._poll.poll, zlib.crc32, MARK
        control = self._pipe.fileno()
        self._poll.register(control, select.EPOLLIN)
        sent: list[int] | None = None
        begun = len(self._socks)
        total, target = 0, -1
        cut, overflowed = [], set()
        bytes_read = reads = 0
        cpu = time.process_time()
        last = moved = time.monotonic()
        while True:
            # Once all is there, one quiet moment more shows what arrives twice.
            ready = poll(QUIET if total == target else STUCK_LIMIT)
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
                    cut.append(fd)
                    total -= counts[fd]
                    self._socks.pop(fd).close()
                    if sent is not None:
                        target = sum(sent) * len(self._socks)
                    continue
                fresh = buffer.count(mark, 0, n)
                counts[fd] += fresh
                total += fresh
                crcs[fd] = crc32(view[:n], crcs[fd])
                bytes_read += n
                reads += 1
                if fd in kept:
                    kept[fd].append(bytes(view[:n]))
                if ages is not None:
                    ages.note(fd, buffer[:n])
                if buffer.find(OVERFLOW, n - 256 if n > 256 else 0, n) >= 0:
                    overflowed.add(fd)
            moment = time.monotonic()
            if total != before:
                last = moved = moment
            elif sent is not None and total != target and moment - moved > STUCK_LIMIT:
                break
        self._poll.unregister(control)
        assert sent is not None
        alive = [fd for fd in self._socks if receive[fd] is not None]
        expected = sum(sent)
        result = {
            "clients": begun,
            "expected": expected * begun,
            "delivered": sum(counts),
            "short": sum(counts[fd] < expected for fd in alive),
            "doubled": sum(counts[fd] > expected for fd in alive),
            "cut": len(cut),
            "cut_by_overflow": len(overflowed & set(cut)),
            "identical": len({crcs[fd] for fd in alive}) <= 1,
            "in_order": all(_in_order(b"".join(kept[fd]), sent) for fd in kept if fd not in cut),
            "last": last,
            "cpu": time.process_time() - cpu,
            "bytes": bytes_read,
            "reads": reads,
        }
        if ages is not None:
            result |= ages.summary()
        return result

    def drain_stalled(self) -> dict[str, int]:
        """Read the stalled clients at last: how many has the server cut, and how many were told why?

        What a server that does not cut has piled up for them need not all be read.
        """
        poll = select.epoll()
        tails = {sock.fileno(): b"" for sock in self._stalled}
        receive = {sock.fileno(): sock.recv_into for sock in self._stalled}
        for fd in tails:
            poll.register(fd, select.EPOLLIN)
        for sock in self._stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        cut = 0
        end = time.monotonic() + DRAIN_LIMIT
        while (ready := poll.poll(2 * QUIET)) and time.monotonic() < end:
            for fd, _ in ready:
                try:
                    n = receive[fd](self._buffer)
                except ConnectionResetError:
                    n = 0
                if n:
                    tails[fd] = (tails[fd] + self._buffer[max(0, n - 512) : n])[-512:]
                else:
                    poll.unregister(fd)
                    cut += 1
        poll.close()
        return {"stalled_cut": cut, "stalled_told": sum(OVERFLOW in tail for tail in tails.values())}

    def close(self) -> None:
        """Leave, all at once and by reset: no port lingers in TIME_WAIT for the next round."""
        for sock in [*self._socks.values(), *self._stalled]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        self._socks.clear()
        self._stalled.clear()


class _Ages:
    """The ages of events. A stamp may be split over two reads, so a read's unfinished rest is kept."""

    def __init__(self) -> None:
        self._rest: dict[int, bytes] = {}
        self._ages: list[int] = []

    def note(self, fd: int, data: bytes | bytearray) -> None:
        now = time.monotonic_ns()
        if rest := self._rest.pop(fd, b""):
            data = rest + data
        end = data.rfind(MARK) + 1
        for found in STAMP.finditer(data, 0, end):
            self._ages.append(now - int(found[1]))
        if not data.endswith(b"\n"):
            self._rest[fd] = bytes(data[end:])

    def summary(self) -> dict[str, float]:
        """Return percentiles in milliseconds."""
        ages = sorted(self._ages)
        if not ages:
            raise BenchError("no event arrived")
        points = {"p50": 0.50, "p99": 0.99, "p999": 0.999, "max": 1.0}
        found = {
            name: ages[min(int(len(ages) * share), len(ages) - 1)] / 1e6 for name, share in points.items()
        }
        return {**found, "timed": len(ages)}


def _begin(port: int, source: int, request: bytes, stalled: bool) -> tuple[socket.socket, bool]:
    """Connect without waiting; on loopback the request can usually go out at once. Return whether it has."""
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
    """Say whether a client got every publish of every connection, once, each connection's in their order."""
    seen = [int(number) for number in NUMBER.findall(data)]
    connections = len(sent)
    return all(
        [n for n in seen if n % connections == k] == list(range(k, count * connections, connections))
        for k, count in enumerate(sent)
    )


def watcher_main(pipe: Connection) -> None:
    """Run the watching process."""
    serve_commands(pipe, Watchers(pipe).commands())
